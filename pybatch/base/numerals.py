"""Figures as people read them: three significant digits, thousands apart, binary units for memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

_LONG = 1e15  # further digits of a float are no longer its own

MISSING = "–"  # a figure that was not measured; the notes say why


def number(value: float | None, digits: int = 3) -> str:
    """A plain number rounded to so many significant digits: 0.0123, 4.56, 78.9, 1,230; a whole one as it is: 32.

    Below 1e-4 and from 1e15 on with an exponent: 2.47e+24.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) >= _LONG:
        return f"{value:.{digits - 1}e}"
    if math.isclose(value, round(value), rel_tol=1e-9) and abs(value) < 10**digits:  # to rounding: 0.1 * 10 is 1
        return f"{value:.0f}"
    exponent = math.floor(math.log10(abs(value)))
    if round(abs(value), digits - 1 - exponent) >= 10 ** (exponent + 1):
        exponent += 1  # 99.96 is read as 100
    rounded = round(value, digits - 1 - exponent)
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}" if exponent >= -4 else f"{rounded:.{digits - 1}e}"


def distinct(values: Sequence[float]) -> list[str]:
    """Different numbers, each in as few digits from three on as tell all of them apart."""
    for digits in range(3, 17):
        names = [number(value, digits) for value in values]
        if len(set(names)) == len(set(values)):
            return names
    return [repr(value) for value in values]


def count(value: float | None) -> str:
    """A whole number in full, with separators: 4,810."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def counted(value: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 batch size", "1,234 batch sizes"; `many` where the plural takes more than an s."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def one_digit(value: float | None) -> str:
    """A spread, of which one significant digit is known: 0.02."""
    return number(value, 1)


def words(value: str | None) -> str:
    """A name of the record in words: "not_reached" -> "not reached"."""
    return MISSING if value is None else value.replace("_", " ")


def yes_no(value: bool | None) -> str:
    """Whether something was seen."""
    return MISSING if value is None else "yes" if value else "no"


def plain(value: object) -> str:
    """Any value of a record: floats in four digits at most, the rest in full, pairs and lists separated by commas."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        text = number(value, 4)
        return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(plain, value))
    return str(value)


def rounded(value: float | None) -> str:
    """A count in full from 100 on, three digits below: 1,234 and 0.512."""
    return number(value) if value is not None and value < 100 else count(value)


def batch_size(value: float | None) -> str:
    """A modelled batch size: three digits at most, whole from 10 on."""
    if value is None or value < 9.95:
        return number(value, 2)
    return count(value) if value < 99.5 else number(value)


def interval(low: float | None, high: float | None, form: Callable[[float | None], str] = number) -> str:
    """An interval in brackets, its ends written by `form`; an open end is spelled out."""
    if low is None and high is None:
        return ""
    if high is None or not math.isfinite(high):
        return f"[≥ {form(low)}]"
    if low is None:
        return f"[≤ {form(high)}]"
    return f"[{form(low)} to {form(high)}]"


def share(value: float | None) -> str:
    """A ratio as a percentage: 0.123 -> 12.3 %."""
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 * value
    return (
        f"{percent:.0f} %"
        if abs(percent) >= 99.5
        else f"{percent:.1f} %"
        if abs(percent) >= 0.05
        else "< 0.1 %"
        if percent
        else "0 %"
    )


def when(iso: str) -> str:
    """A time of a record as people write it: 2 January 2026, 03:04 UTC."""
    at = datetime.fromisoformat(iso)
    return f"{at.day} {at:%B %Y, %H:%M} {at.tzname() or ''}".strip()


def memory(bytes_: float | None) -> str:
    """Bytes in binary units: 1.5 GiB."""
    if bytes_ is None:
        return MISSING
    power = min(len(_BINARY) - 1, int(math.log(max(1.0, abs(bytes_)), 1024)))
    return f"{number(bytes_ / 1024**power)} {_BINARY[power]}"


def rate(value: float | None, unit: str) -> str:
    """A rate with a decimal prefix: 87.1 GFLOP/s."""
    if value is None:
        return MISSING
    scale, prefix = next((s for s in _DECIMAL if abs(value) >= s[0]), _DECIMAL[-1])
    return f"{number(value / scale)} {prefix}{unit}"
