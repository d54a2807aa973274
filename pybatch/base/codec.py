"""Dataclasses to plain JSON types and back, by their annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pybatch.base.errors import UsageError

_DAMAGED = "The file is damaged, or no pybatch wrote it."


# Metadata of fields that stand at the top of the JSON record, beside their section.
TOP = {"json": "top"}


def stands_at_top(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is marked `TOP`."""
    return field.metadata.get("json") == "top"


def encode(value: Any) -> Any:
    """A value as plain JSON types; fields that stand at the top are left out, non-finite numbers become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if not stands_at_top(f)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: Any, value: Any, path: str) -> Any:
    """Build a value of the annotated type from JSON types; the path names what is wrong."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        choices = [a for a in arguments if a is not type(None)]
        if len(choices) > 1:  # plain alternatives, such as float | str
            return value
        return decode(choices[0], value, path)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{path} is {value!r} where the record has an object. {_DAMAGED}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UsageError(
                f"{path} has unknown keys {unknown}. It was written by another pybatch, or changed by hand; "
                "measure again."
            )
        try:
            return kind(**{key: decode(hints[key], item, f"{path}.{key}") for key, item in value.items()})
        except TypeError as error:
            raise UsageError(f"{path} is incomplete: {error}. {_DAMAGED}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{path} is {value!r} where the record has a list. {_DAMAGED}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UsageError(f"{path} has {len(value)} entries where the record has {len(kinds)}. {_DAMAGED}")
        return tuple(decode(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{path} is {value!r} where the record has an object. {_DAMAGED}")
        return {key: decode(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{path} is {value!r}, which is none of {', '.join(arguments)}. {_DAMAGED}")
        return value
    return _decode_plain(kind, value, path)


def _decode_plain(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{path} is {value!r} where the record has a {kind.__name__}. {_DAMAGED}")
    return value
