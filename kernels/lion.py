"""Triton twin of lion.h: Lion (Chen et al. 2023, algorithm 2)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule
from pybatch.kernels.table import LR, hyper_columns

BETA1, BETA2, WEIGHT_DECAY = hyper_columns("Lion", "beta1", "beta2", "weight_decay")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """The scalars of one tensor."""
    lr, beta1, beta2 = tl.load(hyper + LR), tl.load(hyper + BETA1), tl.load(hyper + BETA2)
    return (
        lr.to(tl.float32),
        (1.0 - lr * tl.load(hyper + WEIGHT_DECAY)).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        (1.0 - beta2).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    lr, shrink, rate1, rate2 = scalars
    average = s[0]
    c = average + rate1 * (g - average)
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, c))  # of 0: 0; of NaN: NaN
    return shrink * p - lr * sign, (average + rate2 * (g - average),)


LION = UpdateRule("Lion", make, update)
