"""Triton twin of muon.h: the element-wise passes around Muon's Newton-Schulz iteration (Jordan et al. 2024)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns

MOMENTUM, NESTEROV = hyper_columns("MuonMomentum", "momentum", "nesterov")
WEIGHT_DECAY, ADJUSTMENT = hyper_columns("MuonMove", "weight_decay", "adjustment")


@triton.jit
def make_momentum(hyper, step, scalar, param_sq, other_sq):
    """The scalars of one tensor."""
    momentum, nesterov = tl.load(hyper + MOMENTUM), tl.load(hyper + NESTEROV)
    return (
        (1.0 - momentum).to(tl.float32),
        tl.where(nesterov != 0.0, 1.0 - momentum, 0.0).to(tl.float32),
        tl.where(nesterov != 0.0, momentum, 1.0).to(tl.float32),
    )


@triton.jit
def update_momentum(scalars, p, g, s):
    """One block of elements; the old value of the staging tensor is not used."""
    rate, ahead_g, ahead_b = scalars
    buffer = s[0] + rate * (g - s[0])
    return plus(plus(0.0, ahead_b, buffer), ahead_g, g), (buffer,)


@triton.jit
def make_move(hyper, step, scalar, param_sq, other_sq):
    """(adjusted rate, factor of the parameter)."""
    lr = tl.load(hyper + LR)
    adjusted, shrink = lr * tl.load(hyper + ADJUSTMENT), 1.0 - lr * tl.load(hyper + WEIGHT_DECAY)
    return adjusted.to(tl.float32), shrink.to(tl.float32)


@triton.jit
def update_move(scalars, p, g, s):
    """One block of elements."""
    lr, shrink = scalars
    return shrink * p - lr * g, s


MUON_MOMENTUM = UpdateRule("MuonMomentum", make_momentum, update_momentum)
MUON_MOVE = UpdateRule("MuonMove", make_move, update_move)
