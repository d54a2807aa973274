"""Muon: hyper-parameters to try, and the update in NumPy float64 (Jordan et al. 2024), with AdamW for the rest."""

import numpy as np
from cases import adamw
from torch.optim import Muon as twin  # noqa: F401

from pybatch.optim import Muon as optimizer  # noqa: F401

LR = 0.05
# Newton-Schulz runs in bf16: an update is off by about 1.5 % of its length, whatever the parameters' dtype.
NOISE = 0.03
VARIANTS = [
    {},
    {"nesterov": False, "momentum": 0.8, "weight_decay": 0.5},
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    {"ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "adjust_lr_fn": "original"},
    {"maximize": True, "adamw_lr": 0.01, "adamw_weight_decay": 0.0, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3},
]


def momentum_rule(p, g, state, lr, momentum, nesterov):
    """The pass before Newton-Schulz: what is orthogonalized takes the parameter's place."""
    b = state["b"] = momentum * state.get("b", 0.0) + (1 - momentum) * g
    return momentum * b + (1 - momentum) * g if nesterov else b


def move_rule(p, g, state, lr, weight_decay, adjustment):
    """The pass after it."""
    return p * (1 - lr * weight_decay) - lr * adjustment * g


MOMENTUM = {"momentum": 0.9, "nesterov": True}
MOVE = {"weight_decay": 0.1, "adjustment": 1.5}
RULES = {"MuonMomentum": (MOMENTUM, MOMENTUM, momentum_rule), "MuonMove": (MOVE, MOVE, move_rule)}


def orthogonal(x, coefficients, steps):
    """Newton-Schulz in float64."""
    a, b, c = coefficients
    x = x / max(np.sqrt((x**2).sum()), 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def adjustment(name, rows, columns):
    return 0.2 * max(rows, columns) ** 0.5 if name == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5


def reference(
    p,
    g,
    state,
    lr,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    ns_coefficients=(3.4445, -4.7750, 2.0315),
    ns_steps=5,
    adjust_lr_fn=None,
    adamw_lr=None,
    adamw_weight_decay=None,
    adamw_betas=(0.9, 0.999),
    adamw_eps=1e-8,
    maximize=False,
    flatten=None,
    adjust=adjustment,
):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    if p.ndim > 2 and flatten is not None:
        more = [weight_decay, momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn]
        if flatten:
            flat = len(p), int(np.prod(p.shape[1:]))
            return reference(p.reshape(flat), g.reshape(flat), state, lr, *more, maximize=maximize).reshape(p.shape)
        pairs = enumerate(zip(p.reshape(-1, *p.shape[-2:]), g.reshape(-1, *p.shape[-2:]), strict=True))
        return np.reshape(
            [reference(q, h, state.setdefault(i, {}), lr, *more, maximize=maximize) for i, (q, h) in pairs], p.shape
        )
    if p.ndim != 2:
        rate = lr if adamw_lr is None else adamw_lr
        decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        return adamw.reference(p, g, state, rate, adamw_betas, adamw_eps, decay, maximize=maximize)
    g = -g if maximize else g
    m = state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * g
    u = momentum * m + (1 - momentum) * g if nesterov else m
    return p * (1 - lr * weight_decay) - lr * adjust(adjust_lr_fn, *p.shape) * orthogonal(u, ns_coefficients, ns_steps)


def ignored_nesterov(p, g, state, lr, nesterov=True, **more):
    """A wrong Muon: Nesterov's look-ahead is left out."""
    return reference(p, g, state, lr, nesterov=False, **more)


def without_momentum(p, g, state, lr, momentum=0.95, **more):
    """A wrong Muon: the gradient itself is orthogonalized."""
    return reference(p, g, state, lr, momentum=0.0, **more)


def unadjusted(p, g, state, lr, **more):
    """A wrong Muon: the learning rate does not depend on the shape."""
    return reference(p, g, state, lr, adjust=lambda *_: 1.0, **more)


def other_coefficient(p, g, state, lr, **more):
    """A wrong Muon: one digit of a Newton-Schulz coefficient."""
    return reference(p, g, state, lr, ns_coefficients=(3.4445, -4.7750, 2.3015), **more)


def one_iteration_less(p, g, state, lr, **more):
    """A wrong Muon: four Newton-Schulz steps in place of five."""
    return reference(p, g, state, lr, ns_steps=4, **more)


def coupled_decay(p, g, state, lr, weight_decay=0.1, **more):
    """A wrong Muon: decay goes through the momentum."""
    return reference(p, g + weight_decay * p, state, lr, weight_decay=0.0, **more)


WRONG = [
    (ignored_nesterov, {"momentum": 0.5}),
    (without_momentum, {}),
    (unadjusted, {}),
    (unadjusted, {"adjust_lr_fn": "match_rms_adamw"}),
    (other_coefficient, {}),
    (one_iteration_less, {}),
    (coupled_decay, {"weight_decay": 0.5}),
]
