"""The optimizer that a user asks for, before the workload's own. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OWN = "own"  # in place of a name: what Workload.optimizer() gives


def is_own(name: object) -> bool:
    """Whether a name in a sweep stands for the workload's own optimizer: "own", and once it is known "own:adamw"."""
    return isinstance(name, str) and name.partition(":")[0] == OWN


@dataclass(frozen=True)
class OptimizerChoice:
    """What was asked for; what is None is the workload's own.

    Args:
        name: of `pybatch.optim`, in any case.
        options: its arguments but the rate, such as {"betas": (0.9, 0.95)}.
        lr: the rate at the reference batch.
    """

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None


def is_plain(value: Any) -> bool:
    """Whether a hyper-parameter is a number, or a tuple of them."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return isinstance(value, int | float)


def told(value: Any) -> str:
    """A hyper-parameter as the command line takes it: "0.9/0.95"."""
    if isinstance(value, tuple | list):
        return "/".join(map(told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
