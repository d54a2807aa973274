"""Triton twin of adam.h: Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018). The moments serve AdamW and LAMB too."""

import triton
import triton.language as tl
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns, power

BETA1, BETA2, EPS, WEIGHT_DECAY = hyper_columns("Adam", "beta1", "beta2", "eps", "weight_decay")


@triton.jit
def make_moments(beta1, beta2, eps, step, lr):
    """The scalars of the moments; lr: what `move` is scaled by."""
    return (
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / (1.0 - power(beta1, step))).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - power(beta2, step))).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def take(moments, g, first, second):
    """Both moments with another gradient."""
    rate1, beta2, rate2, _size, _correction2, _eps = moments
    return first + rate1 * (g - first), beta2 * second + rate2 * (g * g)


@triton.jit
def move(moments, first, second):
    """The bias-corrected step. The root is approximate on a GPU, as in rule.h; of a subnormal second moment it is 0."""
    _rate1, _beta2, _rate2, size, correction2, eps = moments
    return size * first / (tl.sqrt(second) * correction2 + eps)


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """(moments, decay)."""
    beta1, beta2, eps = tl.load(hyper + BETA1), tl.load(hyper + BETA2), tl.load(hyper + EPS)
    moments = make_moments(beta1, beta2, eps, step, tl.load(hyper + LR))
    return moments, tl.load(hyper + WEIGHT_DECAY).to(tl.float32)


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    moments, decay = scalars
    first, second = take(moments, plus(g, decay, p), s[0], s[1])
    return p - move(moments, first, second), (first, second)


@triton.jit
def update_amsgrad(scalars, p, g, s):
    """One block of elements, with the largest second moment so far."""
    moments, decay = scalars
    first, second = take(moments, plus(g, decay, p), s[0], s[1])
    peak = tl.where(s[2] > second, s[2], second)
    return p - move(moments, first, peak), (first, second, peak)


ADAM = UpdateRule("Adam", make, update)
ADAM_AMSGRAD = UpdateRule("AdamAmsgrad", make, update_amsgrad)
