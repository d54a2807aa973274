"""Triton twin of lamb.h: LAMB (You et al. 2020, algorithm 2)."""

import triton
import triton.language as tl
from pybatch.kernels.adam import make_moments, move, take
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import HYPER_OWN


@triton.jit
def make(hyper, step, param_sq, direction_sq):
    """(moments, decay, rate times trust ratio)."""
    known = (param_sq != 0.0) & (direction_sq != 0.0)
    ratio = tl.sqrt(tl.where(known, param_sq, 1.0) / tl.where(known, direction_sq, 1.0))
    bound = tl.load(hyper + HYPER_OWN + 4)
    scale = tl.load(hyper) * tl.where(ratio > bound, bound, ratio)
    decay = tl.load(hyper + HYPER_OWN + 3)
    return make_moments(hyper, step, 1.0), decay.to(tl.float32), scale.to(tl.float32)


@triton.jit
def prepare(scalars, g, s0, s1, s2):
    """The moments with another gradient."""
    moments, _decay, _scale = scalars
    s0, s1 = take(moments, g, s0, s1)
    return s0, s1, s2


@triton.jit
def direction(scalars, p, s0, s1, s2):
    """What the trust ratio is taken of."""
    moments, decay, _scale = scalars
    return plus(move(moments, s0, s1), decay, p)


@triton.jit
def update(scalars, p, g, s0, s1, s2):
    """One block of elements."""
    _moments, _decay, scale = scalars
    return p - scale * direction(scalars, p, s0, s1, s2), s0, s1, s2


LAMB = UpdateRule(2, make, update, "direction", prepare, direction)
