"""What lies in the attributes of a module or an optimizer, at any depth: containers, arrays, small objects, tensors."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_DEEP = 8  # containers within containers that are followed
_WIDE = 100_000  # entries of one, above which they are kept, but not followed: those are data
# Nothing of these is a training's state, or it is kept elsewhere.
_LEFT = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    nn.Module,
    torch.optim.Optimizer,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
)


class Contents:
    """Finds and keeps what steps may change in given values; tensors are left to the caller.

    Args:
        values: attributes, which are followed; they themselves are not assigned anew.
        apart: objects that are not looked into.
    """

    def __init__(self, values: Iterable[Any], apart: Iterable[Any] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._kept: list[_Holder] = []
        self._seen = {id(one) for one in apart}
        self._alive: list[Any] = []  # so that no identity of `_seen` is given away
        for value in values:
            self._follow(value, _DEEP)

    def restore(self) -> None:
        """Put the same objects into the same containers; those that did not change are not touched."""
        for one in self._kept:
            one.restore()

    def _follow(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or isinstance(value, _LEFT):
            return
        self._seen.add(id(value))
        self._alive.append(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return
        if depth == 0:
            return
        holder = _holder(value)
        if holder is not None:
            self._kept.append(holder)
        inside = _inside(value)
        if len(inside) <= _WIDE:
            for one in inside:
                self._follow(one, depth - 1)


class _Holder(Protocol):
    def restore(self) -> None: ...


def _holder(value: Any) -> _Holder | None:
    numpy = sys.modules.get("numpy")
    if isinstance(value, list | dict | set | deque | bytearray):
        return _Container(value)
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _Array(value) if value.flags.writeable else None
    return _Object(value) if _has_attributes(value) else None


def _inside(value: Any) -> list[Any]:
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | deque | set | frozenset):
        inside = list(value)
    return [*inside, *vars(value).values()] if _has_attributes(value) else inside


def _has_attributes(value: Any) -> bool:
    """Whether it is an object with attributes of its own, and none of torch's, such as a process group."""
    return type(value).__dictoffset__ != 0 and type(value).__module__.partition(".")[0] != "torch"


def _plain(value: Any) -> Any:
    """The built-in kind of a container, whose own methods a subclass does not get in the way of."""
    return next(kind for kind in (OrderedDict, dict, list, set, deque, bytearray) if isinstance(value, kind))


class _Container:
    def __init__(self, holder: Any) -> None:
        self._holder, self._kind = holder, _plain(holder)
        self._held = self._entries()

    def restore(self) -> None:
        holder, kind, now = self._holder, self._kind, self._entries()
        if len(now) == len(self._held) and all(map(_identical, now, self._held)):
            return
        kind.clear(holder)
        if kind in (list, deque, bytearray):
            kind.extend(holder, self._held)
        else:
            kind.update(holder, self._held)

    def _entries(self) -> list[Any]:
        return list(self._kind.items(self._holder)) if issubclass(self._kind, dict) else list(self._holder)


def _identical(one: Any, other: Any) -> bool:
    if type(one) is tuple and type(other) is tuple and len(one) == len(other) == 2:  # of a dictionary
        return one[0] is other[0] and one[1] is other[1]
    return one is other


class _Object:
    def __init__(self, owner: Any) -> None:
        self._attributes: dict[str, Any] = vars(owner)
        self._held = dict(self._attributes)

    def restore(self) -> None:
        now = self._attributes
        if list(now) != list(self._held) or any(now[name] is not value for name, value in self._held.items()):
            now.clear()
            now.update(self._held)


class _Array:
    def __init__(self, array: Any) -> None:
        self._array, self._held = array, array.copy()

    def restore(self) -> None:
        if self._array.shape == self._held.shape:
            self._array[...] = self._held
