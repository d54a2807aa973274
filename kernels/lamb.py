"""Triton twin of lamb.h: LAMB (You et al. 2020, algorithm 2)."""

import triton
import triton.language as tl
from pybatch.kernels.adam import make_moments, move, take
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns

BETA1, BETA2, EPS = hyper_columns("Lamb", "beta1", "beta2", "eps")
WEIGHT_DECAY, MAX_RATIO = hyper_columns("Lamb", "weight_decay", "max_ratio")


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """(moments, decay, rate times trust ratio)."""
    known = (param_sq != 0.0) & (other_sq != 0.0)
    ratio = tl.sqrt(tl.where(known, param_sq, 1.0) / tl.where(known, other_sq, 1.0))
    bound = tl.load(hyper + MAX_RATIO)
    scale = tl.load(hyper + LR) * tl.where(ratio > bound, bound, ratio)
    beta1, beta2, eps = tl.load(hyper + BETA1), tl.load(hyper + BETA2), tl.load(hyper + EPS)
    moments = make_moments(beta1, beta2, eps, step, 1.0)
    return moments, tl.load(hyper + WEIGHT_DECAY).to(tl.float32), scale.to(tl.float32)


@triton.jit
def prepare(scalars, g, s):
    """The moments with another gradient."""
    moments, _decay, _scale = scalars
    return take(moments, g, s[0], s[1])


@triton.jit
def direction(scalars, p, s):
    """What the trust ratio is taken of."""
    moments, decay, _scale = scalars
    return plus(move(moments, s[0], s[1]), decay, p)


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    _moments, _decay, scale = scalars
    return p - scale * direction(scalars, p, s), s


LAMB = UpdateRule("Lamb", make, update, prepare, direction)
