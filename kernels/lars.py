"""Triton twin of lars.h: LARS (You, Gitman & Ginsburg 2017, algorithm 1)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """The scalars of one tensor; direction_sq: squares of the gradient that `update` sees."""
    momentum, decay = tl.load(hyper + HYPER_OWN), tl.load(hyper + HYPER_OWN + 1)
    trust, eps = tl.load(hyper + HYPER_OWN + 2), tl.load(hyper + HYPER_OWN + 3)
    nesterov = tl.load(hyper + HYPER_OWN + 4)
    p, g = tl.sqrt(param_sq), tl.sqrt(direction_sq)
    local = tl.where((p == 0.0) | (g == 0.0), 1.0, trust * p / (plus(g, decay, p) + eps))
    return (
        tl.load(hyper).to(tl.float32),
        local.to(tl.float32),
        decay.to(tl.float32),
        momentum.to(tl.float32),
        tl.where(nesterov != 0.0, 1.0, 0.0).to(tl.float32),
        tl.where(nesterov != 0.0, momentum, 1.0).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    lr, local, decay, momentum, ahead_g, ahead_b = scalars
    g = local * plus(g, decay, p)
    s0 = plus(g, momentum, s0)
    return p - lr * plus(plus(0.0, ahead_b, s0), ahead_g, g), s0, s1, s2


LARS = UpdateRule(1, make, update, "gradient")
