"""Triton twin of adam.h: Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018). The moments serve AdamW and LAMB too."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import HYPER_OWN, power


@triton.jit
def make_moments(hyper, step, lr):
    """The scalars of the moments; lr: what `move` is scaled by."""
    beta1, beta2, eps = tl.load(hyper + HYPER_OWN), tl.load(hyper + HYPER_OWN + 1), tl.load(hyper + HYPER_OWN + 2)
    return (
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / (1.0 - power(beta1, step))).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - power(beta2, step))).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def take(moments, g, s0, s1):
    """Both moments with another gradient."""
    rate1, beta2, rate2, _size, _correction2, _eps = moments
    return s0 + rate1 * (g - s0), beta2 * s1 + rate2 * (g * g)


@triton.jit
def move(moments, first, second):
    """The bias-corrected step."""
    _rate1, _beta2, _rate2, size, correction2, eps = moments
    return size * first / (tl.sqrt_rn(second) * correction2 + eps)


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """(moments, decay)."""
    return make_moments(hyper, step, tl.load(hyper)), tl.load(hyper + HYPER_OWN + 3).to(tl.float32)


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    moments, decay = scalars
    s0, s1 = take(moments, plus(g, decay, p), s0, s1)
    return p - move(moments, s0, s1), s0, s1, s2


@triton.jit
def update_amsgrad(scalars, p, g, s0, s1, s2):
    """One block of elements, with the largest second moment so far."""
    moments, decay = scalars
    s0, s1 = take(moments, plus(g, decay, p), s0, s1)
    s2 = tl.where(s2 > s1, s2, s1)
    return p - move(moments, s0, s2), s0, s1, s2


ADAM = UpdateRule(2, make, update)
ADAM_AMSGRAD = UpdateRule(3, make, update_amsgrad)
