"""Dataclasses to plain JSON types and back, by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pybatch.base.errors import UsageError
from pybatch.base.plain import said

_DAMAGED = "The file is damaged, or no pybatch wrote it."
_LARGEST = 2**63  # of whole numbers; a float is at most the largest there is


# Metadata of fields that stand at the top of the JSON record, beside their section.
TOP = {"json": "top"}

Check = Callable[[Any], str | None]  # of a record that was read: what is wrong with it, after its path


def stands_at_top(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is marked `TOP`."""
    return field.metadata.get("json") == "top"


def parse(text: str | bytes) -> Any:
    """JSON as plain types.

    Raises:
        ValueError: it is no JSON, or nests too deep, or has a number of thousands of digits, with what is wrong.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects within each other without end") from None


def encode(value: Any) -> Any:
    """A value as plain JSON types; fields that stand at the top are left out, non-finite numbers become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if not stands_at_top(f)}
    if isinstance(value, Mapping):
        return {_text(str(key)): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    """Text that can be written: bytes of a path that are no UTF-8 are half a character each in Python."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def decode(kind: Any, value: Any, path: str, check: Check = lambda record: None) -> Any:
    """Build a value of the annotated type from JSON types.

    Args:
        kind: a dataclass, a plain type, or a tuple, dict, union or Literal of such.
        value: of plain JSON types.
        path: its name in errors.
        check: of each record in it: what is wrong beyond the types, in words that follow the path.

    Raises:
        UsageError: it is no such value; the message has the path, what is there, and what must be.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, value, path, check)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, path, check)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{path} is {said(value)} where the record has a list. {_DAMAGED}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UsageError(f"{path} has {len(value)} entries where the record has {len(kinds)}. {_DAMAGED}")
        return tuple(
            decode(k, item, f"{path}[{i}]", check) for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{path} is {said(value)} where the record has an object. {_DAMAGED}")
        keys = {_decode_plain(str, key, f"a name in {path}"): item for key, item in value.items()}
        return {key: decode(arguments[1], item, f"{path}.{key}", check) for key, item in keys.items()}
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise UsageError(f"{path} is {said(value)}, which is none of {', '.join(arguments)}. {_DAMAGED}")
        return value
    return _decode_plain(kind, value, path)


def _decode_union(choices: tuple[Any, ...], value: Any, path: str, check: Check) -> Any:
    if value is None and types.NoneType in choices:
        return None
    left = [choice for choice in choices if choice is not types.NoneType]
    if len(left) == 1:
        return decode(left[0], value, path, check)
    for choice in sorted(left, key=lambda choice: choice is float):  # a whole number stays one where it may
        try:
            return decode(choice, value, path, check)
        except UsageError:
            continue
    names = ", ".join(getattr(choice, "__name__", str(choice)) for choice in left)
    raise UsageError(f"{path} is {said(value)} where the record has one of {names}. {_DAMAGED}")


@functools.cache
def _fields(kind: type) -> tuple[Mapping[str, Any], frozenset[str]]:
    """The types of a record's fields by name, and the names that have no default."""
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing}
    return typing.get_type_hints(kind), frozenset(needed)


def _decode_record(kind: type, value: Any, path: str, check: Check) -> Any:
    if not isinstance(value, dict):
        raise UsageError(f"{path} is {said(value)} where the record has an object. {_DAMAGED}")
    hints, needed = _fields(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise UsageError(
            f"{path} has unknown keys {said(unknown)}. It was written by another pybatch, or changed by hand; "
            "measure again."
        )
    if lacking := [name for name in hints if name in needed and name not in value]:
        raise UsageError(f"{path} is incomplete: it lacks {', '.join(lacking)}. {_DAMAGED}")
    record = kind(**{key: decode(hints[key], item, f"{path}.{key}", check) for key, item in value.items()})
    if (wrong := check(record)) is not None:
        raise UsageError(f"{path}{wrong}. {_DAMAGED}")
    return record


def _decode_plain(kind: Any, value: Any, path: str) -> Any:
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        if not -_LARGEST < value < _LARGEST:
            raise UsageError(f"{path} is {said(value)}: a number must lie between -2**63 and 2**63. {_DAMAGED}")
        return kind(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{path} is {value}: a figure must be finite, or null. {_DAMAGED}")
    if kind is str and isinstance(value, str) and _text(value) != value:
        raise UsageError(f"{path} is {said(value)}, which has half a character in it. {_DAMAGED}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{path} is {said(value)} where the record has a {kind.__name__}. {_DAMAGED}")
    return value
