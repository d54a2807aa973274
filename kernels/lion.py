"""Triton twin of lion.h: Lion (Chen et al. 2023, algorithm 2)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """The scalars of one tensor."""
    lr, beta1, beta2 = tl.load(hyper), tl.load(hyper + HYPER_OWN), tl.load(hyper + HYPER_OWN + 1)
    return (
        lr.to(tl.float32),
        (1.0 - lr * tl.load(hyper + HYPER_OWN + 2)).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        (1.0 - beta2).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    lr, shrink, rate1, rate2 = scalars
    c = s0 + rate1 * (g - s0)
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))  # of 0: 0; of NaN: NaN
    return shrink * p - lr * sign, s0 + rate2 * (g - s0), s1, s2


LION = UpdateRule(1, make, update)
