"""Triton twin of muon.h: the element-wise passes around Muon's Newton-Schulz iteration (Jordan et al. 2024)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make_momentum(hyper, step, param_sq, direction_sq):
    """The scalars of one tensor."""
    momentum, nesterov = tl.load(hyper + HYPER_OWN), tl.load(hyper + HYPER_OWN + 1)
    return (
        (1.0 - momentum).to(tl.float32),
        tl.where(nesterov != 0.0, 1.0 - momentum, 0.0).to(tl.float32),
        tl.where(nesterov != 0.0, momentum, 1.0).to(tl.float32),
    )


@triton.jit
def update_momentum(scalars, p, g, s0, s1, s2):
    """One block of elements; the old value of the staging tensor is not used."""
    rate, ahead_g, ahead_b = scalars
    s0 = s0 + rate * (g - s0)
    return plus(plus(0.0, ahead_b, s0), ahead_g, g), s0, s1, s2


@triton.jit
def make_move(hyper, step, param_sq, direction_sq):
    """(adjusted rate, factor of the parameter)."""
    lr = tl.load(hyper)
    adjusted, shrink = lr * tl.load(hyper + HYPER_OWN + 1), 1.0 - lr * tl.load(hyper + HYPER_OWN)
    return adjusted.to(tl.float32), shrink.to(tl.float32)


@triton.jit
def update_move(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    lr, shrink = scalars
    return shrink * p - lr * g, s0, s1, s2


MUON_MOMENTUM = UpdateRule(1, make_momentum, update_momentum)
MUON_MOVE = UpdateRule(0, make_move, update_move)
