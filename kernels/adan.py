"""Triton twin of adan.h: Adan (Xie et al. 2022, algorithm 1), in its authors' form."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns, power

BETA1, BETA2, BETA3 = hyper_columns("Adan", "beta1", "beta2", "beta3")
EPS, WEIGHT_DECAY, NO_PROX = hyper_columns("Adan", "eps", "weight_decay", "no_prox")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """The scalars of one tensor."""
    lr = tl.load(hyper + LR)
    decay, no_prox = lr * tl.load(hyper + WEIGHT_DECAY), tl.load(hyper + NO_PROX) != 0.0
    beta1, beta2, beta3 = tl.load(hyper + BETA1), tl.load(hyper + BETA2), tl.load(hyper + BETA3)
    return (
        (1.0 - beta1).to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        beta2.to(tl.float32),
        beta3.to(tl.float32),
        (1.0 - beta3).to(tl.float32),
        (lr / (1.0 - power(beta1, step))).to(tl.float32),
        (lr * beta2 / (1.0 - power(beta2, step))).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - power(beta3, step))).to(tl.float32),
        tl.load(hyper + EPS).to(tl.float32),
        tl.where(no_prox, 1.0 - decay, 1.0).to(tl.float32),
        tl.where(no_prox, 1.0, 1.0 / (1.0 + decay)).to(tl.float32),
        tl.where(step <= 1.0, 0.0, 1.0).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    rate1, rate2, beta2, beta3, rate3, size, size_diff, correction3, eps, before, after, known = scalars
    difference = plus(0.0, known, g + s[3])
    ahead = plus(g, beta2, difference)
    average = s[0] + rate1 * (g - s[0])
    square = beta3 * s[1] + rate3 * (ahead * ahead)
    change = s[2] + rate2 * (difference - s[2])
    move = plus(size * average, size_diff, change) / (tl.sqrt(square) * correction3 + eps)
    return after * (before * p - move), (average, square, change, -g)


ADAN = UpdateRule("Adan", make, update)
