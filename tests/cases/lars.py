"""LARS: hyper-parameters to try, and the update in NumPy float64 (You, Gitman, Ginsburg 2017, algorithm 1)."""

import numpy as np

from pybatch.optim import LARS as optimizer  # noqa: F401

twin = None  # torch has none
LR = 2.0  # times the trust coefficient: a step of about 1 % of a tensor's norm
VARIANTS = [
    {"trust_coefficient": 0.02},
    {"trust_coefficient": 0.02, "skip": False, "weight_decay": 0.05},  # every tensor by its own norms
    {"trust_coefficient": 0.02, "skip": False, "momentum": 0.0, "eps": 10.0},
    {"trust_coefficient": 0.02, "skip": False, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    {"trust_coefficient": 0.02, "skip": False, "maximize": True, "weight_decay": 0.05},
    {"skip": True, "momentum": 0.5},
]

HYPER = {"momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.5, "eps": 1e-8, "nesterov": True}
RULES = {"Lars": (HYPER, HYPER | {"skip": False})}


def length(x):
    return np.sqrt((x**2).sum())


def local_rate(p, g, trust_coefficient, weight_decay, eps):
    """The paper's equation 6; 1 where a norm is 0."""
    if length(p) == 0 or length(g) == 0:
        return 1.0
    return trust_coefficient * length(p) / (length(g) + weight_decay * length(p) + eps)


def reference(
    p,
    g,
    state,
    lr,
    momentum=0.9,
    weight_decay=0.0,
    trust_coefficient=0.001,
    eps=0.0,
    nesterov=False,
    skip=None,
    maximize=False,
    rate=local_rate,
):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    skipped = p.ndim <= 1 if skip is None else skip
    if not skipped:
        g = rate(p, g, trust_coefficient, weight_decay, eps) * (g + weight_decay * p)
    m = state["m"] = momentum * state.get("m", 0.0) + g
    return p - lr * (g + momentum * m if nesterov else m)


def without_ratio(p, g, state, lr, **more):
    """A wrong LARS: the local rate is left out."""
    return reference(p, g, state, lr, rate=lambda *_: 0.02, **more)


def decay_outside_the_ratio(p, g, state, lr, weight_decay=0.0, **more):
    """A wrong LARS: the decay does not count in the denominator of the local rate."""
    rate = lambda p, g, trust, _, eps: local_rate(p, g, trust, 0.0, eps)  # noqa: E731
    return reference(p, g, state, lr, weight_decay=weight_decay, rate=rate, **more)


def ratio_after_momentum(p, g, state, lr, momentum=0.9, trust_coefficient=0.001, skip=None, **more):
    """A wrong LARS: the momentum is of gradients, and the local rate scales the move."""
    m = state["m"] = momentum * state.get("m", 0.0) + g
    return p - lr * local_rate(p, g, trust_coefficient, 0.0, 0.0) * m


def nothing_skipped(p, g, state, lr, **more):
    """A wrong LARS: biases get a local rate too."""
    return reference(p, g, state, lr, skip=False, **more)


WRONG = [
    (without_ratio, {"trust_coefficient": 0.02, "skip": False}),
    (decay_outside_the_ratio, {"trust_coefficient": 0.02, "skip": False, "weight_decay": 0.3}),
    (ratio_after_momentum, {"trust_coefficient": 0.02, "skip": False}),
    (nothing_skipped, {"trust_coefficient": 0.02}),
]
