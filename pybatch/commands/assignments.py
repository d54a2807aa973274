"""KEY=VALUE lists as users type them: targets "train=0.1,test=0.2", an optimizer "sgd:momentum=0.9". No torch here."""

from __future__ import annotations

import ast
from typing import Any

from pybatch.base.errors import UsageError


def parse_targets(text: str) -> dict[str, float]:
    """Loss targets by split. Raises UsageError naming the part that is wrong."""
    found: dict[str, float] = {}
    for key, value in _pairs(text, "target", "train=0.1,test=0.2"):
        try:
            found[key] = float(value)
        except ValueError:
            raise UsageError(f"target {text!r}: {value!r} is not a number. Write 'train=0.1,test=0.2'.") from None
    return found


def parse_optimizer(text: str) -> tuple[str, dict[str, Any]]:
    """An optimizer's name and its arguments: numbers, True, False, None and tuples of them."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for key, value in _pairs(rest, "optimizer", "sgd:momentum=0.9,nesterov=True") if colon else ():
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UsageError(
                f"optimizer {text!r}: {value!r} is not a number, True, False or None. Write 'sgd:momentum=0.9'."
            ) from None
    if "lr" in options:
        raise UsageError(
            f"optimizer {text!r}: the sweep chooses the learning rate. Leave lr out; --rates sets the grid."
        )
    return name.strip(), options


def _pairs(text: str, what: str, example: str) -> list[tuple[str, str]]:
    """Pairs of a comma-separated list; commas within brackets are part of a value."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    found: list[tuple[str, str]] = []
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise UsageError(f"{what} {text!r}: {part.strip()!r} is not KEY=VALUE. Write {example!r}.")
        if key in dict(found):
            raise UsageError(f"{what} {text!r}: {key!r} is given twice. Give it once.")
        found.append((key, value))
    return found
