"""Triton twin of sgd.h: SGD with momentum, in torch.optim.SGD's form (Sutskever et al. 2013)."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """Learning rate and decay."""
    return tl.load(hyper).to(tl.float32), tl.load(hyper + HYPER_OWN + 2).to(tl.float32)


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    lr, decay = scalars
    return p - lr * plus(g, decay, p), s0, s1, s2


@triton.jit
def make_with_momentum(hyper, step, param_sq, direction_sq):
    """The scalars of one tensor."""
    lr, weight_decay = tl.load(hyper), tl.load(hyper + HYPER_OWN + 2)
    momentum, dampening = tl.load(hyper + HYPER_OWN), tl.load(hyper + HYPER_OWN + 1)
    nesterov = tl.load(hyper + HYPER_OWN + 3)
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
def update_with_momentum(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    lr, decay, keep, add, ahead_g, ahead_b = scalars
    g = plus(g, decay, p)
    s0 = plus(add * g, keep, s0)
    return p - lr * plus(plus(0.0, ahead_b, s0), ahead_g, g), s0, s1, s2


SGD = UpdateRule(0, make, update)
SGD_MOMENTUM = UpdateRule(1, make_with_momentum, update_with_momentum)
