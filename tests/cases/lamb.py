"""LAMB: hyper-parameters to try, and the update in NumPy float64 (You et al. 2020, algorithm 2)."""

import math

import numpy as np
from cases import adamw

from pybatch.optim import LAMB as optimizer  # noqa: F401

twin = None  # torch has none
LR = 0.02
VARIANTS = [
    {},
    {"skip": False},  # every tensor by its own norms
    {"skip": False, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"skip": False, "betas": (0.0, 0.95), "weight_decay": 0.0, "max_ratio": 0.8},
    {"skip": False, "maximize": True, "weight_decay": 0.1},
    {"skip": True},
]

RULES = {
    "Lamb": (
        adamw.KERNEL_HYPER | {"max_ratio": math.inf},
        adamw.KERNEL_OPTIONS | {"skip": False},
    )
}


def length(x):
    return np.sqrt((x**2).sum())


def trust_ratio(p, u, max_ratio):
    """|p| / |u|, 1 where either is 0."""
    ratio = 1.0 if length(p) == 0 or length(u) == 0 else length(p) / length(u)
    return ratio if max_ratio is None else min(ratio, max_ratio)


def reference(
    p,
    g,
    state,
    lr,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    max_ratio=None,
    skip=None,
    maximize=False,
    ratio=trust_ratio,
    corrected=True,
):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g**2
    if corrected:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    u = m / (np.sqrt(v) + eps)
    if p.ndim <= 1 if skip is None else skip:
        return p - lr * u
    u = u + weight_decay * p
    return p - lr * ratio(p, u, max_ratio) * u


def without_ratio(p, g, state, lr, **more):
    """A wrong LAMB: the trust ratio is left out, which is AdamW."""
    return reference(p, g, state, lr, ratio=lambda *_: 1.0, **more)


def without_correction(p, g, state, lr, **more):
    """A wrong LAMB: the bias correction is forgotten."""
    return reference(p, g, state, lr, corrected=False, **more)


def swapped_betas(p, g, state, lr, betas=(0.9, 0.999), **more):
    """A wrong LAMB: the two rates are exchanged."""
    return reference(p, g, state, lr, betas=betas[::-1], **more)


def decay_outside_the_ratio(p, g, state, lr, weight_decay=0.01, **more):
    """A wrong LAMB: decay is no part of the direction whose norm is taken."""
    return reference(p, g, state, lr, weight_decay=0.0, **more) - lr * weight_decay * p


def nothing_skipped(p, g, state, lr, **more):
    """A wrong LAMB: biases get a trust ratio and decay too."""
    return reference(p, g, state, lr, skip=False, **more)


def unclamped(p, g, state, lr, max_ratio=None, **more):
    """A wrong LAMB: the bound on the ratio is forgotten."""
    return reference(p, g, state, lr, **more)


WRONG = [
    (without_ratio, {"skip": False}),
    (without_correction, {"skip": True}),  # with the ratio, the length of the direction hardly counts
    (swapped_betas, {"skip": False}),
    (decay_outside_the_ratio, {"skip": False, "weight_decay": 0.5}),
    (nothing_skipped, {}),
    (unclamped, {"skip": False, "max_ratio": 0.5}),
]
