"""What a table of tensors was built from, and whether all of it still stands: looked at in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch

_get_dtype = attrgetter("dtype")


def layouts(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Shapes, strides, dtypes: one list each, because 1000 tensors are read in every step. Addresses tell devices."""
    of = torch.Tensor
    return (
        list(map(of.size, tensors)),
        list(map(of.stride, tensors)),
        list(map(_get_dtype, tensors)),
    )


def places(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Addresses of the first elements."""
    return list(map(torch.Tensor.data_ptr, tensors))


class Snapshot:
    """Parameters by group, the memory of the listed ones and the tensors of their states, when a table was built.

    Args:
        groups: torch's `param_groups`.
        state: torch's `optimizer.state`.
        listed: the parameters in the table.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Any, dict[str, Any]], listed: Sequence[torch.Tensor]
    ) -> None:
        self._kept = [param for group in groups for param in group["params"]]  # so that no id is given out again
        self._members = _members(groups)
        self._listed = listed
        self._memory = (places(listed), *layouts(listed))
        self._values = _values(state)
        self._tensors = [value for value in self._values if isinstance(value, torch.Tensor)]
        self._state_places = places(self._tensors)

    def stands(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, dict[str, Any]]) -> bool:
        """Whether nothing was replaced, resized, moved or cast since."""
        values = _values(state)
        return (
            _members(groups) == self._members
            and (places(self._listed), *layouts(self._listed)) == self._memory
            and len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and places(self._tensors) == self._state_places
        )


def _members(groups: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in groups]


def _values(state: Mapping[Any, dict[str, Any]]) -> list[Any]:
    return [value for own in state.values() for value in own.values()]
