"""Triton twin of adamw.h: Adam with decoupled weight decay (Loshchilov & Hutter 2019), AMSGrad (Reddi et al. 2018)."""

import triton
import triton.language as tl
from pybatch.kernels.adam import make_moments, move, take
from pybatch.kernels.rule import UpdateRule
from pybatch.kernels.table import LR, hyper_columns

BETA1, BETA2, EPS, WEIGHT_DECAY = hyper_columns("AdamW", "beta1", "beta2", "eps", "weight_decay")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """(moments, factor of the parameter)."""
    lr, decay = tl.load(hyper + LR), tl.load(hyper + WEIGHT_DECAY)
    beta1, beta2, eps = tl.load(hyper + BETA1), tl.load(hyper + BETA2), tl.load(hyper + EPS)
    return make_moments(beta1, beta2, eps, step, lr), (1.0 - lr * decay).to(tl.float32)


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    moments, shrink = scalars
    first, second = take(moments, g, s[0], s[1])
    return shrink * p - move(moments, first, second), (first, second)


@triton.jit
def update_amsgrad(scalars, p, g, s):
    """One block of elements, with the largest second moment so far."""
    moments, shrink = scalars
    first, second = take(moments, g, s[0], s[1])
    peak = tl.where(s[2] > second, s[2], second)
    return shrink * p - move(moments, first, peak), (first, second, peak)


ADAMW = UpdateRule("AdamW", make, update)
ADAMW_AMSGRAD = UpdateRule("AdamWAmsgrad", make, update_amsgrad)
