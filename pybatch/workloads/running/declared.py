"""What a workload's class says of itself, checked before anything is measured: records and fits take it as it is."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pybatch.base.errors import WorkloadError
from pybatch.workloads.base import Workload

_LIKE, _ALIKE = 0.9, 0.85  # of difflib, for values and for methods: a letter of ten, or two that changed places
_METHODS = tuple(key for key, value in vars(Workload).items() if inspect.isfunction(value) and not key.startswith("_"))
_SPLITS = ("train", "test")


def check(workload: Workload) -> None:
    """Raise WorkloadError for an attribute of a workload that is not what `Workload` says it is."""
    for name in _METHODS:
        if not callable(found := getattr(workload, name)) or isinstance(found, torch.nn.Module):
            kind = type(found).__name__
            raise WorkloadError(f"{type(workload).__name__}.{name} is of {kind}: make it a method that returns one.")
    for name, fits, wanted in _ATTRIBUTES:
        value = getattr(workload, name)
        if not fits(value):
            said = repr(value)
            said = said if len(said) <= 80 else f"{said[:77]}..."
            raise WorkloadError(f"{type(workload).__name__}.{name} is {said}: it must be {wanted}.")
    _check_names(workload)


def _check_names(workload: Workload) -> None:
    """Raise WorkloadError for a value whose name can only be a slip of an attribute's that is left at its default."""
    known = {name: fits for name, fits, _ in _ATTRIBUTES}
    classes = [cls for cls in type(workload).__mro__ if cls not in Workload.__mro__]
    own = {key: value for part in (*reversed(classes), workload) for key, value in vars(part).items()}
    for key, value in own.items():
        near = next(iter(difflib.get_close_matches(key, known, 1, cutoff=_LIKE)), None) if key not in known else None
        if near is None or near in own or value is None or not known[near](value):
            continue
        # With something before or behind it, or without its plural's, a name is one's own; but for targets of losses.
        if key == near.removesuffix("s") or (near in key and not (key == f"{near}s" and isinstance(value, Mapping))):
            continue
        raise _asked(workload, key, near)
    for key in (key for key, value in own.items() if callable(value) and key not in _METHODS):
        near = next(iter(difflib.get_close_matches(key, _METHODS, 1, cutoff=_ALIKE)), None)
        if near is not None and near not in own and near not in key and key not in near:
            raise _asked(workload, key, near)


def _asked(workload: Workload, key: str, near: str) -> WorkloadError:
    asked = f"{type(workload).__name__}.{key}: is it {near}?"
    return WorkloadError(f"{asked} Name it so, or otherwise if it is another thing.")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _dials(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and (isinstance(v, str) or _number(v)) for k, v in value.items()
    )


def _targets(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and k.partition(":")[0] in _SPLITS and _number(v) for k, v in value.items()
    )


def _ways(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and v in ("higher", "lower") for k, v in value.items())


_ATTRIBUTES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", _text, "a text that is not empty"),
    ("unit", _text, "a text that is not empty, such as 'images'"),
    ("weight_unit", _text, "a text that is not empty, such as 'tokens'"),
    ("model_name", lambda value: value is None or isinstance(value, str), "a text, or None"),
    ("learning_rate", lambda value: _number(value) and value > 0, "a number above 0"),
    ("reference_batch", _count, "a whole number of examples, at least 1"),
    ("steps", _count, "a whole number, at least 1"),
    ("examples", lambda value: value is None or _count(value), "a whole number, at least 1, or None"),
    ("target", _targets, "losses by split, such as {'train': 0.3}, or metrics, {'test:accuracy': 0.95}"),
    ("better", _ways, "'higher' or 'lower' by the name of a metric, such as {'accuracy': 'higher'}"),
    ("options", _dials, "numbers and texts by name"),
)
