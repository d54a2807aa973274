"""The tensors that a model gives back, in whatever it holds them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

_DEPTH = 3  # of objects within objects


def leaves_in(output: Any, depth: int = _DEPTH) -> list[Any]:
    """All leaves, always in the same order: of containers, dataclasses, namespaces and distributions."""
    if isinstance(output, Tensor):  # the usual case, in every pass
        return [output]
    found: list[Any] = []
    for leaf in tree_leaves(output):
        inside = _inside(leaf) if depth else None
        found += [leaf] if inside is None else leaves_in(inside, depth - 1)
    return found


def _inside(leaf: Any) -> list[Any] | None:
    """What an object that holds tensors has; None of any other."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    return list(vars(leaf).values()) if isinstance(leaf, SimpleNamespace | Distribution) else None
