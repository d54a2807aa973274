"""Triton twin of adamw.h: Adam with decoupled weight decay (Loshchilov & Hutter 2019), AMSGrad (Reddi et al. 2018)."""

import triton
import triton.language as tl
from pybatch.kernels.table import power


@triton.jit
def make(hyper, step, own: tl.constexpr):
    """The scalars of one tensor, in float64, from its group's row and its step."""
    lr = tl.load(hyper)
    beta1, beta2 = tl.load(hyper + own), tl.load(hyper + own + 1)
    eps, weight_decay = tl.load(hyper + own + 2), tl.load(hyper + own + 3)
    shrink = (1.0 - lr * weight_decay).to(tl.float32)
    step_size = (lr / (1.0 - power(beta1, step))).to(tl.float32)
    correction2 = (1.0 / tl.sqrt(1.0 - power(beta2, step))).to(tl.float32)
    return (
        shrink,
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        step_size,
        correction2,
        eps.to(tl.float32),
    )


@triton.jit
def update(scalars, p, g, s0, s1, s2, amsgrad: tl.constexpr):
    """One block of elements: parameter and states after the update."""
    shrink, rate1, beta2, rate2, step_size, correction2, eps = scalars
    s0 = s0 + rate1 * (g - s0)
    s1 = beta2 * s1 + rate2 * (g * g)
    second = s1
    if amsgrad:
        s2 = tl.maximum(s2, s1)
        second = s2
    p = shrink * p - step_size * s0 / (tl.sqrt_rn(second) * correction2 + eps)
    return p, s0, s1, s2
