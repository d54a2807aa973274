"""Adam: hyper-parameters to try, and the update in NumPy float64 (Kingma & Ba 2015, algorithm 1; decay is coupled)."""

from cases import adamw
from torch.optim import Adam as twin  # noqa: F401

from pybatch.optim import Adam as optimizer  # noqa: F401

LR = 0.05  # large against the parameters, so that a wrong update shows
VARIANTS = [
    {},
    {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.95), "weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.3},
]

RULES = {
    "Adam": (adamw.KERNEL_HYPER, adamw.KERNEL_OPTIONS),
    "AdamAmsgrad": (adamw.KERNEL_HYPER, adamw.KERNEL_OPTIONS | {"amsgrad": True}),
}


def reference(p, g, state, lr, weight_decay=0.0, maximize=False, decoupled_weight_decay=False, **more):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = -g if maximize else g
    if decoupled_weight_decay:
        return adamw.reference(p, g, state, lr, weight_decay=weight_decay, **more)
    return adamw.reference(p, g + weight_decay * p, state, lr, weight_decay=0.0, **more)


def without_correction(p, g, state, lr, **more):
    """A wrong Adam: the bias correction is forgotten."""
    return adamw.without_correction(p, g, state, lr, weight_decay=0.0, **more)


def swapped_betas(p, g, state, lr, betas=(0.9, 0.999), **more):
    """A wrong Adam: the two rates are exchanged."""
    return reference(p, g, state, lr, betas=betas[::-1], **more)


def decoupled_decay(p, g, state, lr, **more):
    """A wrong Adam: decay does not go through the moments, as in AdamW."""
    return reference(p, g, state, lr, decoupled_weight_decay=True, **more)


def decay_before_maximize(p, g, state, lr, weight_decay=0.0, maximize=False, **more):
    """A wrong Adam: maximize turns the decay around with the gradient."""
    return reference(p, g + weight_decay * p, state, lr, maximize=maximize, **more)


WRONG = [
    (without_correction, {}),
    (swapped_betas, {}),
    (decoupled_decay, {"weight_decay": 0.3}),
    (decay_before_maximize, {"weight_decay": 0.3, "maximize": True}),
]
