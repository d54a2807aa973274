"""Triton twin of nadam.h: NAdam (Dozat 2016), in torch.optim.NAdam's form."""

import triton
import triton.language as tl
from pybatch.kernels.adam import make_moments, take
from pybatch.kernels.rule import UpdateRule, plus
from pybatch.kernels.table import LR, hyper_columns, power

BETA1, BETA2, EPS = hyper_columns("NAdam", "beta1", "beta2", "eps")
WEIGHT_DECAY, DECOUPLED = hyper_columns("NAdam", "weight_decay", "decoupled_weight_decay")
MOMENTUM_DECAY = hyper_columns("NAdam", "momentum_decay")[0]


@triton.jit
def momentum(hyper, step):
    """Half of beta1 at first."""
    return tl.load(hyper + BETA1) * (1.0 - 0.5 * power(0.96, step * tl.load(hyper + MOMENTUM_DECAY)))


@triton.jit
def next_product(hyper, step, product):
    """The product of all momenta, this step's too."""
    return product * momentum(hyper, step)


@triton.jit
def make(hyper, step, scalar, param_sq, other_sq):
    """(moments, factor of the parameter, decay, shares of gradient and momentum)."""
    lr, decay = tl.load(hyper + LR), tl.load(hyper + WEIGHT_DECAY)
    decoupled = tl.load(hyper + DECOUPLED) != 0.0
    product, ahead = next_product(hyper, step, scalar), momentum(hyper, step + 1.0)
    moments = make_moments(tl.load(hyper + BETA1), tl.load(hyper + BETA2), tl.load(hyper + EPS), step, lr)
    return (
        moments,
        tl.where(decoupled, 1.0 - lr * decay, 1.0).to(tl.float32),
        tl.where(decoupled, 0.0, decay).to(tl.float32),
        (lr * (1.0 - momentum(hyper, step)) / (1.0 - product)).to(tl.float32),
        (lr * ahead / (1.0 - product * ahead)).to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s):
    """One block of elements."""
    moments, shrink, decay, share_g, share_m = scalars
    _rate1, _beta2, _rate2, _size, correction2, eps = moments
    g = plus(g, decay, p)
    first, second = take(moments, g, s[0], s[1])
    ahead = plus(share_g * g, share_m, first)
    return shrink * p - ahead / (tl.sqrt(second) * correction2 + eps), (first, second)


NADAM = UpdateRule("NAdam", make, update, next_scalar=next_product)
