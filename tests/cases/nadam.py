"""NAdam: hyper-parameters to try, and the update in NumPy float64 (Dozat 2016, in torch.optim.NAdam's form)."""

import numpy as np
from torch.optim import NAdam as twin  # noqa: F401

from pybatch.optim import NAdam as optimizer  # noqa: F401

LR = 0.05  # large against the parameters, so that a wrong update shows
VARIANTS = [
    {},
    {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3, "momentum_decay": 0.5},
    {"betas": (0.0, 0.95), "weight_decay": 0.1},
    {"weight_decay": 0.3, "decoupled_weight_decay": True, "momentum_decay": 0.0},
    {"maximize": True, "weight_decay": 0.1},
]
_OPTIONS = {"eps": 1e-3, "weight_decay": 0.3, "momentum_decay": 0.5, "decoupled_weight_decay": True}
RULES = {"NAdam": (_OPTIONS | {"beta1": 0.8, "beta2": 0.9}, _OPTIONS | {"betas": (0.8, 0.9)})}


def growing(t, beta1, momentum_decay):
    """Momentum of step t."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))


def reference(
    p,
    g,
    state,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
    maximize=False,
    momentum=growing,
):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g**2
    mu, ahead = (momentum(at, betas[0], momentum_decay) for at in (t, t + 1))
    product = state["product"] = state.get("product", 1.0) * mu
    mean = (1 - mu) * g / (1 - product) + ahead * m / (1 - product * ahead)
    return p - lr * mean / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def forgotten_product(p, g, state, lr, betas=(0.9, 0.999), **more):
    """A wrong NAdam: what is kept of a tensor is the last momentum, not the product of all."""
    state["product"] = 1.0
    return reference(p, g, state, lr, betas=betas, **more)


def constant_momentum(p, g, state, lr, **more):
    """A wrong NAdam: the momentum does not grow."""
    return reference(p, g, state, lr, momentum=lambda t, beta1, decay: beta1, **more)


def not_ahead(p, g, state, lr, **more):
    """A wrong NAdam: the step takes the first moment alone, as Adam."""
    kept = state.setdefault("adam", {})
    product = kept.get("product", 1.0)
    moved = reference(p, g, kept, lr, **more)
    mu = kept["product"] / product
    return moved + lr * (1 - mu) * g / (1 - kept["product"]) / (np.sqrt(kept["v"] / (1 - 0.999 ** kept["t"])) + 1e-8)


def swapped_decay(p, g, state, lr, decoupled_weight_decay=False, **more):
    """A wrong NAdam: coupled where it should be decoupled."""
    return reference(p, g, state, lr, decoupled_weight_decay=not decoupled_weight_decay, **more)


WRONG = [
    (forgotten_product, {}),
    (constant_momentum, {}),
    (not_ahead, {}),
    (swapped_decay, {"weight_decay": 0.3}),
    (swapped_decay, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
]
