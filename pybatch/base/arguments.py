"""Arguments of public functions, held against their annotations before anything is done."""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar

from pybatch.base.errors import UsageError
from pybatch.base.plain import given

P = ParamSpec("P")
R = TypeVar("R")

_LISTS = (Sequence, Iterable, list, tuple)
# What to give: one, and in a list.
_WORDS: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers, such as [8, 16]"),
    float: ("a number", "numbers"),
    str: ("a name", "names"),
    Path: ("a path", "paths"),
    NoneType: ("None", "None"),
}


def typed(call: Callable[P, R]) -> Callable[P, R]:
    """Refuse an argument that is no number, path or list where one is asked for, with what to give.

    What else an annotation says is the function's own to check: of a name it knows which there are.
    """
    signature = inspect.signature(call)
    name = call.__qualname__.removesuffix(".__init__")

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return call(*args, **kwargs)  # which says the same of itself
        hints = _hints(call)
        check({name: hints.get(name) for name in arguments}, arguments, f"{name}(): ")
        if "seed" in arguments:
            check_seed(arguments["seed"])
        return call(*args, **kwargs)

    return checked


def check(hints: Mapping[str, Any], values: Mapping[str, Any], where: str = "") -> None:
    """UsageError for the first of these values that does not fit its annotation."""
    for name, kind in hints.items():
        if name in values and not _fits(values[name], kind):
            raise UsageError(f"{where}{name} is {given(values[name])}. Give {_asked(kind)}.")


def check_seed(seed: int, count: int = 1) -> None:
    """UsageError where this seed, or the last of so many from it on, is none that torch and numpy both take."""
    if not 0 <= seed <= 2**63 - count:
        raise UsageError(f"seed {seed} is out of range. Give a whole number from 0 to 2**63 - 1.")


@functools.cache
def _hints(call: Callable[..., object]) -> dict[str, Any]:
    return typing.get_type_hints(call)


def _fits(value: Any, kind: Any) -> bool:
    if len(kinds := _kinds(kind)) > 1:
        return any(_fits(value, one) for one in kinds)
    (kind,) = kinds
    if typing.get_origin(kind) in _LISTS:
        inner = typing.get_args(kind)[0]
        if isinstance(value, str | bytes) and inner not in _WORDS:
            return True  # of names of any kind
        if isinstance(value, str | bytes | Iterator | Mapping) or not isinstance(value, Iterable):
            return False
        try:
            return all(_fits(one, inner) for one in value)
        except TypeError:  # an array without dimensions
            return False
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, typing.get_args(kind)[1]) for one in value.values())
    if _is_path(kind):
        return isinstance(value, str | PathLike)
    test = _TESTS.get(kind) if kind.__hash__ is not None else None
    return test is None or test(value)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """What an annotation allows; a path may always be text."""
    if not isinstance(kind, UnionType) and typing.get_origin(kind) is not typing.Union:
        return (kind,)
    kinds = typing.get_args(kind)
    return tuple(one for one in kinds if not (one is str and any(map(_is_path, kinds))))


def _is_path(kind: Any) -> bool:
    return kind in (Path, PathLike) or typing.get_origin(kind) is PathLike


def _does(call: Callable[[Any], object]) -> Callable[[Any], bool]:
    def test(value: Any) -> bool:
        try:
            call(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of torch
            return False
        return not isinstance(value, str | bytes)

    return test


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return operator.index(value)


_TESTS: Mapping[Any, Callable[[Any], bool]] = {
    int: _does(_whole),
    float: _does(_number),
    NoneType: lambda value: value is None,
}


def _asked(kind: Any) -> str:
    if len(kinds := _kinds(kind)) > 1:
        return ", or ".join(map(_asked, kinds))
    (kind,) = kinds
    if typing.get_origin(kind) in _LISTS:
        inner = typing.get_args(kind)[0]
        if typing.get_origin(inner) in _LISTS:
            return f"a list of lists{_asked(inner).removeprefix('a list')}"
        return f"a list of {_WORDS[inner][1]}" if inner in _WORDS else "a list"
    if typing.get_origin(kind) is Mapping:
        inner = typing.get_args(kind)[1]
        return f"a mapping of names to {_WORDS[inner][1]}" if inner in _WORDS else "a mapping"
    known = _WORDS.get(Path if _is_path(kind) else kind)
    return known[0] if known is not None else getattr(kind, "__name__", str(kind))
