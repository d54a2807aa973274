"""Triton twin of sgd.h: SGD with momentum, in torch.optim.SGD's form (Sutskever et al. 2013)."""

import triton
import triton.language as tl


@triton.jit
def make(hyper, step, own: tl.constexpr):
    """The scalars of one tensor, in float64, from its group's row and its step."""
    lr, weight_decay = tl.load(hyper), tl.load(hyper + own + 2)
    momentum, dampening, nesterov = tl.load(hyper + own), tl.load(hyper + own + 1), tl.load(hyper + own + 3)
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
def update(scalars, p, g, s0, momentum: tl.constexpr):
    """One block of elements: parameter and momentum after the update."""
    lr, decay, keep, add, ahead_g, ahead_b = scalars
    g = g + decay * p
    if momentum:
        s0 = keep * s0 + add * g
        g = ahead_g * g + ahead_b * s0
    return p - lr * g, s0
