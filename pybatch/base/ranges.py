"""Batch ranges as users type them: "1,2,8", "16-4096*2" (geometric), "16-64+16" (arithmetic), and lists of these."""

from __future__ import annotations

import re

from pybatch.base.errors import UsageError
from pybatch.base.plain import said

_RANGE = re.compile(r"([0-9]+)-([0-9]+)([*+])([0-9]+(?:\.[0-9]+)?)")
LARGEST = 2**40  # examples in a batch: more fit no memory there is
_DIGITS = 15  # more are a slip of the pen, and thousands are more than Python reads
_MOST = 1000  # batch sizes in one range: more is a slip of the pen, not an experiment


def parse_batches(text: str) -> list[int]:
    """Batch sizes of a range, ascending and without repeats. Raises UsageError naming the part that is wrong."""
    batches: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        batches += _parse_part(part, text)
        if len(batches) > _MOST:
            raise UsageError(f"batch {said(text)} names over {_MOST} batch sizes. Take a larger factor or step.")
    return sorted(set(batches))


def _check(size: int, whole: str) -> None:
    if size > LARGEST:
        raise UsageError(f"batch {said(whole)}: {size} is out of range. A batch has at most 2**40 examples.")


def _parse_part(part: str, whole: str) -> list[int]:
    if any(len(digits) > _DIGITS for digits in re.findall("[0-9]+", part)):
        raise UsageError(f"batch {said(whole)}: {said(part)} has too many digits. A batch has at most 2**40 examples.")
    if part.isascii() and part.isdecimal():
        _check(int(part), whole)
        if int(part) < 1:
            raise UsageError(f"batch {said(whole)}: {part} is below 1. A batch has at least one example.")
        return [int(part)]
    match = _RANGE.fullmatch(part)
    if not match:
        raise UsageError(
            f"batch {said(whole)}: {said(part)} is not a batch size or a range. Write '1,2,8', '16-4096*2' or "
            "'16-64+16'."
        )
    start, stop, operator = int(match[1]), int(match[2]), match[3]
    _check(stop, whole)
    if start > stop:
        raise UsageError(
            f"batch {said(whole)}: start {start} is above stop {stop}. Write '{stop}-{start}{operator}{match[4]}'."
        )
    if start < 1:
        raise UsageError(f"batch {said(whole)}: start {start} is below 1. A batch has at least one example.")
    if operator == "*":
        factor = float(match[4])
        if factor <= 1:
            raise UsageError(
                f"batch {said(whole)}: factor {match[4]} does not grow. Write a factor above 1, such as '*2'."
            )
        sizes: list[int] = []
        size = float(start)
        while round(size) <= stop and len(sizes) <= _MOST:
            sizes.append(round(size))
            size *= factor
        return sizes
    if not match[4].isdecimal() or int(match[4]) < 1:
        raise UsageError(
            f"batch {said(whole)}: step {match[4]} is not a whole number above 0. Write a step such as '+16'."
        )
    step = int(match[4])
    return list(range(start, min(stop, start + step * _MOST) + 1, step))
