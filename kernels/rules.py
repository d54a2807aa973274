"""The list of update rules: Triton's side of rules.h, with the same numbers."""

from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from typing import Any

from pybatch.kernels import adam, adamw, lamb, lars, lion, muon, sgd
from pybatch.kernels.rule import UpdateRule

RULES: dict[int, UpdateRule] = {
    0: sgd.SGD,
    1: sgd.SGD_MOMENTUM,
    2: adamw.ADAMW,
    3: adamw.ADAMW_AMSGRAD,
    4: adam.ADAM,
    5: adam.ADAM_AMSGRAD,
    6: lion.LION,
    7: lars.LARS,
    8: lamb.LAMB,
    9: muon.MUON_MOMENTUM,
    10: muon.MUON_MOVE,
}


def with_norms(norms: str, numbers: Iterable[int]) -> tuple[int, ...]:
    """Those of the rules that need these norms."""
    return tuple(number for number in numbers if RULES[number].norms == norms)


def selection(numbers: Iterable[int]) -> tuple[tuple[Any, ...], ...]:
    """What a kernel takes as a constant, so that it is compiled for a list's own rules only: one
    (number, states, prepared, carried, make, update, prepare, direction, key) per rule.

    The key changes with the functions' source: Triton's cache on disk looks no deeper than a tuple's text. Triton 3.6
    takes only numbers and functions in a tuple: the key is a number, and update stands for a function a rule lacks.
    """
    return tuple(_constant(number) for number in numbers)


@cache
def _constant(number: int) -> tuple[Any, ...]:
    rule = RULES[number]
    functions = (rule.make, rule.update, rule.prepare or rule.update, rule.direction or rule.update)
    sources = " ".join(getattr(function, "cache_key", "") for function in functions)  # the interpreter has none
    key = int.from_bytes(sha256(sources.encode()).digest()[:7], "big")
    return (number, rule.states, rule.norms == "direction", rule.norms == "gradient", *functions, key)
