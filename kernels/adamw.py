"""Triton twin of adamw.h: Adam with decoupled weight decay (Loshchilov & Hutter 2019), AMSGrad (Reddi et al. 2018)."""

import triton
import triton.language as tl
from pybatch.kernels.adam import make_moments, move, take
from pybatch.kernels.rule import UpdateRule
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """(moments, factor of the parameter)."""
    lr = tl.load(hyper)
    return make_moments(hyper, step, lr), (1.0 - lr * tl.load(hyper + HYPER_OWN + 3)).to(tl.float32)


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    moments, shrink = scalars
    s0, s1 = take(moments, g, s0, s1)
    return shrink * p - move(moments, s0, s1), s0, s1, s2


@triton.jit
def update_amsgrad(scalars, p, g, s0, s1, s2):
    """One block of elements, with the largest second moment so far."""
    moments, shrink = scalars
    s0, s1 = take(moments, g, s0, s1)
    s2 = tl.where(s2 > s1, s2, s1)
    return shrink * p - move(moments, s0, s2), s0, s1, s2


ADAMW = UpdateRule(2, make, update)
ADAMW_AMSGRAD = UpdateRule(3, make, update_amsgrad)
