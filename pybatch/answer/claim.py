"""One claim of the seed paper, and what a sweep says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finding = Literal["yes", "no", "undetermined", "not measured"]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and what this sweep says of it."""

    name: str  # a label of a few words
    claim: str  # as the paper has it
    finding: Finding
    text: str  # what was seen here, with its figures
    # The figure that the finding stands on, with its interval; None: there is none, or an end is open.
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int | None = None  # that the figure stands on, where it is one of seeds compared with themselves
