"""Triton twin of rule.h: the contract of an update rule.

make(hyper, step, scalar, param_sq, other_sq) -> scalars  of one tensor, in float64, from its group's row of
                                                          hyper-parameters, its step, what is kept of it from step to
                                                          step, and its squared norms
update(scalars, p, g, s) -> p, s                          a block of elements; s: a tuple of the rule's states
prepare(scalars, g, s) -> s                               norms "direction" only
direction(scalars, p, s) -> block                         norms "direction" only
next_scalar(hyper, step, scalar) -> scalar                rules that keep one: its value after this step
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def plus(base, coefficient, x):
    """base + coefficient * x, and the base alone where the coefficient is 0: 0 times infinity would be NaN."""
    return base + coefficient * tl.where(coefficient != 0.0, x, 0.0)


class UpdateRule(NamedTuple):
    """A rule's functions, each @triton.jit, under its name in rules.h."""

    name: str
    make: Any
    update: Any
    prepare: Any = None
    direction: Any = None
    next_scalar: Any = None
