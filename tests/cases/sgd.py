"""SGD: hyper-parameters to try, and the update in NumPy float64 (torch.optim.SGD's form)."""

from torch.optim import SGD as twin  # noqa: F401

from pybatch.optim import SGD as optimizer  # noqa: F401

LR = 0.1
VARIANTS = [
    {},
    {"weight_decay": 0.2},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.5, "maximize": True},
]

HYPER = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True}
RULES = {
    "Sgd": (HYPER | {"momentum": 0.0, "nesterov": False}, {"weight_decay": 0.1}),
    "SgdMomentum": (HYPER, HYPER),
}


def reference(p, g, state, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """One step on float64 arrays; `state` is a dict that starts empty. Returns the new parameter."""
    g = (-g if maximize else g) + weight_decay * p
    if momentum:
        first = "b" not in state
        b = state["b"] = g if first else momentum * state["b"] + (1 - dampening) * g
        g = g + momentum * b if nesterov else b
    return p - lr * g


def dampened_start(p, g, state, lr, dampening=0.0, **more):
    """A wrong SGD: dampening already applies to the first momentum."""
    state.setdefault("b", 0.0 * g)
    return reference(p, g, state, lr, dampening=dampening, **more)


def ignored_nesterov(p, g, state, lr, nesterov=False, **more):
    """A wrong SGD: Nesterov's look-ahead is left out."""
    return reference(p, g, state, lr, **more)


def decoupled_decay(p, g, state, lr, weight_decay=0.0, **more):
    """A wrong SGD: decay does not go through the momentum."""
    return reference(p, g, state, lr, **more) - lr * weight_decay * p


WRONG = [
    (dampened_start, {"momentum": 0.8, "dampening": 0.5}),
    (ignored_nesterov, {"momentum": 0.9, "nesterov": True}),
    (decoupled_decay, {"momentum": 0.9, "weight_decay": 0.3}),
]
