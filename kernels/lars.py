"""Triton twin of lars.h: LARS (You, Gitman & Ginsburg 2017, algorithm 1)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns

MOMENTUM, WEIGHT_DECAY, NESTEROV = hyper_columns("Lars", "momentum", "weight_decay", "nesterov")
TRUST, EPS = hyper_columns("Lars", "trust_coefficient", "eps")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """The scalars of one tensor; other_sq: squares of the gradient that `update` sees."""
    momentum, decay = tl.load(hyper + MOMENTUM), tl.load(hyper + WEIGHT_DECAY)
    trust, eps, nesterov = tl.load(hyper + TRUST), tl.load(hyper + EPS), tl.load(hyper + NESTEROV)
    p, g = tl.sqrt(param_sq), tl.sqrt(other_sq)
    local = tl.where((p == 0.0) | (g == 0.0), 1.0, trust * p / (plus(g, decay, p) + eps))
    return (
        tl.load(hyper + LR).to(tl.float32),
        local.to(tl.float32),
        decay.to(tl.float32),
        momentum.to(tl.float32),
        tl.where(nesterov != 0.0, 1.0, 0.0).to(tl.float32),
        tl.where(nesterov != 0.0, momentum, 1.0).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    lr, local, decay, momentum, ahead_g, ahead_b = scalars
    g = local * plus(g, decay, p)
    buffer = plus(g, momentum, s[0])
    return p - lr * plus(plus(0.0, ahead_b, buffer), ahead_g, g), (buffer,)


LARS = UpdateRule("Lars", make, update)
