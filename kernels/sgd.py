"""Triton twin of sgd.h: SGD with momentum, in torch.optim.SGD's form (Sutskever et al. 2013)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns

MOMENTUM, DAMPENING = hyper_columns("SgdMomentum", "momentum", "dampening")
WEIGHT_DECAY, NESTEROV = hyper_columns("SgdMomentum", "weight_decay", "nesterov")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """Learning rate and decay."""
    return tl.load(hyper + LR).to(tl.float32), tl.load(hyper + WEIGHT_DECAY).to(tl.float32)


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    lr, decay = scalars
    return p - lr * plus(g, decay, p), s


@triton.jit
def make_with_momentum(hyper, step, scalar, param_sq, other_sq):
    """The scalars of one tensor."""
    lr, weight_decay = tl.load(hyper + LR), tl.load(hyper + WEIGHT_DECAY)
    momentum, dampening = tl.load(hyper + MOMENTUM), tl.load(hyper + DAMPENING)
    nesterov = tl.load(hyper + NESTEROV)
    keep = tl.where(step <= 1.0, 0.0, momentum)  # the first momentum is the gradient itself
    add = tl.where(step <= 1.0, 1.0, 1.0 - dampening)
    ahead_b = tl.where(nesterov != 0.0, momentum, 1.0)
    return (
        lr.to(tl.float32),
        weight_decay.to(tl.float32),
        keep.to(tl.float32),
        add.to(tl.float32),
        nesterov.to(tl.float32),
        ahead_b.to(tl.float32),
    )


@triton.jit
def update_with_momentum(scalars, p, g, s):
    """One block of elements."""
    lr, decay, keep, add, ahead_g, ahead_b = scalars
    g = plus(g, decay, p)
    buffer = plus(add * g, keep, s[0])
    return p - lr * plus(plus(0.0, ahead_b, buffer), ahead_g, g), (buffer,)


SGD = UpdateRule("Sgd", make, update)
SGD_MOMENTUM = UpdateRule("SgdMomentum", make_with_momentum, update_with_momentum)
