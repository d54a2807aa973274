"""The errors a user can meet. Each message gives the user's value, the cause and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PybatchError(Exception):
    """Base of every error pybatch raises on purpose."""


class UsageError(PybatchError, ValueError):
    """An argument that cannot work: found before anything is measured or written."""


class WorkloadError(PybatchError):
    """A workload's own method failed or returned what it must not. Names the method."""

    begun = False  # whether it had been trained for a while: then it did not fail at once
    rows: int | None = None  # of a batch of another size than was asked for


class DeviceError(PybatchError, RuntimeError):
    """The device asked for is not there or cannot do what was asked."""


class InstallationError(PybatchError, ImportError):
    """A part of pybatch itself is not where Python looks for it."""


class StoreError(PybatchError, RuntimeError):
    """The store of a sweep failed while the sweep ran: the disk is full, the file damaged, gone, or held by another."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a measurement; `partial` is the record of what had been measured."""

    def __init__(self, partial: Any) -> None:
        super().__init__("interrupted; what was measured is in .partial")
        self.partial = partial


def carry(error: Exception, partial: Any) -> None:
    """Let an error that was not foreseen carry the record of what had been measured; see `carried`."""
    error.pybatch_partial = partial  # type: ignore[attr-defined]


def carried(error: BaseException) -> Any:
    """The record that an error carries, or None."""
    return getattr(error, "pybatch_partial", None)


def unknown(what: str, value: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `known`: names the nearest, and lists them all."""
    names = sorted(known)
    if not isinstance(value, str):
        return UsageError(f"{what} {value!r} is no name. Known: {', '.join(names) or 'none'}.")
    lower, text = {name.lower(): name for name in reversed(names)}, value.lower()
    near = difflib.get_close_matches(text, lower, n=1, cutoff=0.5)
    if near and near[0][:1] != text[:1]:  # half of the letters of another word are no likeness
        near = difflib.get_close_matches(text, near)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return UsageError(f"{what} {value!r} is not known.{hint} Known: {', '.join(names) or 'none'}.")
