"""KEY=VALUE lists as users type them: targets "train=0.1,test=0.2", an optimizer "sgd:momentum=0.9". No torch here."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from pybatch.base.errors import UsageError
from pybatch.base.plain import said

_TARGETS = "Write 'train=0.1,test=0.2'."
_LARGEST = 1e30  # an argument of an optimizer, in fp32


def parse_targets(text: str) -> dict[str, float]:
    """Loss targets by split; a number alone is a train loss. Raises UsageError naming the part that is wrong."""
    found: dict[str, float] = {}
    alone = re.fullmatch(r"\s*[-+]?(\d[\d.eE+-]*|\.\d[\d.eE+-]*|nan|inf)\s*", text) is not None
    pairs = [("train", text.strip())] if alone else _pairs(text, f"target {said(text)}", "train=0.1,test=0.2")
    for key, value in pairs:
        try:
            found[key] = float(value)
        except ValueError:
            raise UsageError(f"target {said(text)}: {said(value)} is not a number. {_TARGETS}") from None
        if not 0 < found[key] < math.inf:
            raise UsageError(f"target {said(text)}: a loss to reach is finite and above 0. {_TARGETS}")
    return found


def parse_train_target(text: str) -> float:
    """The train loss to reach, as 0.3 or train=0.3. Raises UsageError naming the part that is wrong."""
    found = parse_targets(text)
    if list(found) != ["train"]:
        raise UsageError(f"target {said(text)}: branches go by the train loss. Write '0.3' or 'train=0.3'.")
    return found["train"]


def parse_optimizer(text: str, rated: bool = False) -> tuple[str, dict[str, Any]]:
    """An optimizer's name and its arguments: numbers, True, False, None, and tuples of them, written (0.9,0.95) or
    0.9/0.95; `rated`: a rate may be among them."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for key, value in _pairs(rest, f"optimizer {said(text)}", "adamw:lr=3e-4,betas=0.9/0.95") if colon else ():
        try:
            parts = value.split("/")
            options[key] = ast.literal_eval(value) if len(parts) == 1 else tuple(map(ast.literal_eval, parts))
            if not _plain(options[key]):
                raise ValueError
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UsageError(
                f"optimizer {said(text)}: {said(value)} is not a number, True, False or None. Write 'sgd:momentum=0.9'."
            ) from None
    if rated and "lr" in options and not _is_rate(options["lr"]):
        raise UsageError(f"optimizer {said(text)}: lr is a number above 0. Write 'adamw:lr=3e-4'.")
    if "lr" in options and not rated:
        raise UsageError(
            f"optimizer {said(text)}: the sweep chooses the learning rate. Leave lr out; --rates sets the grid."
        )
    return name.strip(), options


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= _LARGEST)


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
            raise UsageError(f"{what}: {said(part.strip())} is not KEY=VALUE. Write {example!r}.")
        if key in dict(found):
            raise UsageError(f"{what} {said(text)}: {said(key)} is given twice. Give it once.")
        found.append((key, value))
    return found
