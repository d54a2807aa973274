"""Lion: hyper-parameters to try, and the update in NumPy float64 (Chen et al. 2023, algorithm 2)."""

import numpy as np

from pybatch.optim import Lion as optimizer  # noqa: F401

twin = None  # torch has none
LR = 0.02
VARIANTS = [
    {},
    {"betas": (0.95, 0.98), "weight_decay": 0.3},
    {"betas": (0.0, 0.9)},
    {"maximize": True, "weight_decay": 0.1},
]

RULES = {
    "Lion": (
        {"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.3},
        {"betas": (0.9, 0.98), "weight_decay": 0.3},
    )
}


def reference(p, g, state, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    m = state.get("m", 0.0)
    c = betas[0] * m + (1 - betas[0]) * g
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return p * (1 - lr * weight_decay) - lr * np.sign(c)


def swapped_betas(p, g, state, lr, betas=(0.9, 0.99), **more):
    """A wrong Lion: the two rates are exchanged."""
    return reference(p, g, state, lr, betas[::-1], **more)


def one_beta(p, g, state, lr, betas=(0.9, 0.99), **more):
    """A wrong Lion: signSGD with momentum, the momentum kept is the one whose sign was taken."""
    return reference(p, g, state, lr, (betas[0], betas[0]), **more)


def coupled_decay(p, g, state, lr, weight_decay=0.0, **more):
    """A wrong Lion: decay goes through the sign."""
    return reference(p, g + weight_decay * p, state, lr, **more)


def without_sign(p, g, state, lr, betas=(0.9, 0.99), **more):
    """A wrong Lion: the sign is left out."""
    m = state.get("m", 0.0)
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * (betas[0] * m + (1 - betas[0]) * g)


WRONG = [(swapped_betas, {}), (one_beta, {}), (coupled_decay, {"weight_decay": 0.3}), (without_sign, {})]
