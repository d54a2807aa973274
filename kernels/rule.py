"""Triton twin of rule.h: the contract of an update rule.

make(hyper, step, param_sq, direction_sq) -> scalars      of one tensor, in float64, from its group's row of
                                                          hyper-parameters, its step and its squared norms
update(scalars, p, g, s0, s1, s2) -> p, s0, s1, s2        a block of elements; states past the rule's count pass through
prepare(scalars, g, s0, s1, s2) -> s0, s1, s2             norms "direction" only
direction(scalars, p, s0, s1, s2) -> block                norms "direction" only
"""

from typing import Any, Literal, NamedTuple

import triton
import triton.language as tl


@triton.jit
def plus(base, coefficient, x):
    """base + coefficient * x, and the base alone where the coefficient is 0: 0 times infinity would be NaN."""
    return base + coefficient * tl.where(coefficient != 0.0, x, 0.0)


class UpdateRule(NamedTuple):
    """A rule's functions, each @triton.jit."""

    states: int
    make: Any
    update: Any
    norms: Literal["none", "gradient", "direction"] = "none"
    prepare: Any = None
    direction: Any = None
