"""The list of update rules: Triton's side of rules.h."""

from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from typing import Any

import triton.language as tl
from pybatch.kernels import adam, adamw, adan, lamb, lars, lion, muon, nadam, sgd
from pybatch.kernels.rule import UpdateRule

from pybatch.ops.compiled import RULES as COMPILED
from pybatch.ops.compiled import core

TWINS: tuple[UpdateRule, ...] = (
    sgd.SGD,
    sgd.SGD_MOMENTUM,
    adamw.ADAMW,
    adamw.ADAMW_AMSGRAD,
    adam.ADAM,
    adam.ADAM_AMSGRAD,
    lion.LION,
    lars.LARS,
    lamb.LAMB,
    muon.MUON_MOMENTUM,
    muon.MUON_MOVE,
    nadam.NADAM,
    adan.ADAN,
)
RULES: dict[int, UpdateRule] = {COMPILED[rule.name].number: rule for rule in TWINS}

# Places in what `selection` gives of a rule; in what `kinds` gives, they come after three of its own.
NUMBER, STATES, SQUARES, PREPARED, CARRIED, MAKE, UPDATE, PREPARE, DIRECTION, NEXT = (
    tl.constexpr(i) for i in range(10)
)
CODE_OF, TYPE_OF, STORAGE_OF, RULE_OF = (tl.constexpr(i) for i in range(4))


def with_norms(norms: str, numbers: Iterable[int]) -> tuple[int, ...]:
    """Those of the rules that need these norms."""
    return tuple(number for number in numbers if COMPILED[RULES[number].name].norms == norms)


def with_scalar(numbers: Iterable[int]) -> tuple[int, ...]:
    """Those of the rules that keep a scalar of each tensor."""
    return tuple(number for number in numbers if COMPILED[RULES[number].name].scalar is not None)


def selection(numbers: Iterable[int]) -> tuple[tuple[Any, ...], ...]:
    """What a kernel takes as a constant, so that it is compiled for a list's own rules only: the places above of each
    rule, and a key.

    The key changes with the functions' source: Triton's cache on disk looks no deeper than a tuple's text. Triton 3.6
    takes only numbers and functions in a tuple: the key is a number, and update stands for a function a rule lacks.
    """
    return tuple(_constant(number) for number in numbers)


def kinds(pairs: Iterable[tuple[int, int]]) -> tuple[tuple[Any, ...], ...]:
    """The same of a list's different (code, type of the gradient): both, the storage, and what `selection` gives."""
    count = core.storage_count
    return tuple((code, dtype, code % count, *_constant(code // count)) for code, dtype in pairs)


@cache
def _constant(number: int) -> tuple[Any, ...]:
    rule = RULES[number]
    compiled, functions = COMPILED[rule.name], tuple(function or rule.update for function in rule[1:])
    sources = " ".join(getattr(function, "cache_key", "") for function in functions)  # the interpreter has none
    key = int.from_bytes(sha256(sources.encode()).digest()[:7], "big")
    norms = compiled.norms == "direction", compiled.norms == "gradient"
    return (number, compiled.states, compiled.squares, *norms, *functions, key)
