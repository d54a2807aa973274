"""AdamW: hyper-parameters to try, and the update in NumPy float64 (Loshchilov & Hutter 2019, algorithm 2)."""

import numpy as np
from torch.optim import AdamW as twin  # noqa: F401

from pybatch.optim import AdamW as optimizer  # noqa: F401

LR = 0.05  # large against the parameters, so that a wrong update shows
VARIANTS = [
    {},
    {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.95), "weight_decay": 0.0},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
]

KERNEL_HYPER = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}
KERNEL_OPTIONS = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
RULES = {
    "AdamW": (KERNEL_HYPER, KERNEL_OPTIONS),
    "AdamWAmsgrad": (KERNEL_HYPER, KERNEL_OPTIONS | {"amsgrad": True}),
}


def reference(p, g, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g**2
    if amsgrad:
        v = state["peak"] = np.maximum(state.get("peak", 0.0), v)
    denominator = np.sqrt(v / (1 - betas[1] ** t)) + eps
    return p * (1 - lr * weight_decay) - lr * (m / (1 - betas[0] ** t)) / denominator


def without_correction(p, g, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, **_):
    """A wrong AdamW: the bias correction is forgotten."""
    m = state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g**2
    return p * (1 - lr * weight_decay) - lr * m / (np.sqrt(v) + eps)


def swapped_betas(p, g, state, lr, betas=(0.9, 0.999), **more):
    """A wrong AdamW: the two rates are exchanged."""
    return reference(p, g, state, lr, betas[::-1], **more)


def coupled_decay(p, g, state, lr, weight_decay=1e-2, **more):
    """A wrong AdamW: decay goes through the moments, as in Adam."""
    return reference(p, g + weight_decay * p, state, lr, weight_decay=0.0, **more)


WRONG = [(without_correction, {}), (swapped_betas, {}), (coupled_decay, {"weight_decay": 0.3})]
