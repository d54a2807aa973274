"""The tensors that a model gives back, in whatever it holds them."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property
from torch.utils._pytree import tree_leaves

_DEPTH = 3  # of objects within objects


def leaves_in(output: Any, depth: int = _DEPTH) -> list[Any]:
    """All leaves, always in the same order: of containers, dataclasses, namespaces and distributions.

    A tensor that is held several times comes once, where it is met first.
    """
    if isinstance(output, Tensor):  # the usual case, in every pass
        return [output]
    found: list[Any] = []
    for leaf in tree_leaves(output):
        inside = _inside(leaf) if depth else None
        found += [leaf] if inside is None else leaves_in(inside, depth - 1)
    first = {id(one): place for place, one in reversed([*enumerate(found)])}
    return [one for place, one in enumerate(found) if not isinstance(one, Tensor) or first[id(one)] == place]


def _inside(leaf: Any) -> list[Any] | None:
    """What an object that holds tensors has; None of any other."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    if isinstance(leaf, Distribution):
        return _given(leaf)
    return list(vars(leaf).values()) if isinstance(leaf, SimpleNamespace) else None


def _given(distribution: Distribution) -> list[Any]:
    """What it holds, but of parameters made of one another, such as probs and logits, the one it began with."""
    kind, held = type(distribution), vars(distribution)
    lazy = [name for name in held if isinstance(inspect.getattr_static(kind, name, None), lazy_property)]
    return [value for name, value in held.items() if name not in lazy[1:]]
