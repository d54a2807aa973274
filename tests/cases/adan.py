"""Adan: hyper-parameters to try, and the update in NumPy float64 (Xie et al. 2022, algorithm 1, its authors' form)."""

import numpy as np

from pybatch.optim import Adan as optimizer  # noqa: F401

twin = None  # torch has none
LR = 0.05  # large against the parameters, so that a wrong update shows
VARIANTS = [
    {},
    {"betas": (0.8, 0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.5, 0.95), "weight_decay": 0.3, "no_prox": True},
    {"maximize": True, "betas": (0.9, 0.0, 0.99), "weight_decay": 0.1},
]
_OPTIONS = {"eps": 1e-3, "weight_decay": 0.3, "no_prox": False}
RULES = {"Adan": (_OPTIONS | {"beta1": 0.8, "beta2": 0.7, "beta3": 0.9}, _OPTIONS | {"betas": (0.8, 0.7, 0.9)})}


def reference(
    p, g, state, lr, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False, maximize=False, ahead=1.0
):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    t = state["t"] = state.get("t", 0) + 1
    difference = g - state.get("g", g)
    state["g"] = g
    m, v, n = (state.get(name, 0.0) for name in "mvn")
    m = state["m"] = betas[0] * m + (1 - betas[0]) * g
    v = state["v"] = betas[1] * v + (1 - betas[1]) * difference
    n = state["n"] = betas[2] * n + (1 - betas[2]) * (g + ahead * betas[1] * difference) ** 2
    m, v, n = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t), n / (1 - betas[2] ** t)
    move = lr * (m + betas[1] * v) / (np.sqrt(n) + eps)
    return p * (1 - lr * weight_decay) - move if no_prox else (p - move) / (1 + lr * weight_decay)


def without_difference(p, g, state, lr, **more):
    """A wrong Adan: the gradient of the step before is forgotten."""
    state.pop("g", None)
    return reference(p, g, state, lr, **more)


def first_difference_of_zero(p, g, state, lr, **more):
    """A wrong Adan: before the first step the gradient is taken to have been 0."""
    state.setdefault("g", 0.0 * g)
    return reference(p, g, state, lr, **more)


def squares_not_ahead(p, g, state, lr, **more):
    """A wrong Adan: the squares are of the gradient alone."""
    return reference(p, g, state, lr, ahead=0.0, **more)


def other_decay(p, g, state, lr, no_prox=False, **more):
    """A wrong Adan: decay of the other kind."""
    return reference(p, g, state, lr, no_prox=not no_prox, **more)


WRONG = [
    (without_difference, {}),
    (first_difference_of_zero, {}),
    (squares_not_ahead, {}),
    (other_decay, {"weight_decay": 3.0}),
]
