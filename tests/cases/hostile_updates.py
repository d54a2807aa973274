"""Sequences of optimizer calls on values that are no training's, side by side with torch's own optimizers."""

import copy
import math

import torch

from pybatch import optim

VALUES = (0.0, -0.0, 1.0, -2.5, 1e-30, 1e30, -1e38, 1e-45, math.inf, -math.inf, math.nan)
SHAPES = ((1,), (7,), (3, 5), (0,), (64,), (257,))


def _arguments(rng):
    """An optimizer by name, and arguments that both take."""
    decay = rng.choice([0.0, 0.0, 0.1])
    if rng.random() < 0.5:
        momentum = rng.choice([0.0, 0.9])
        dampening = rng.choice([0.0, 0.3])
        nesterov = momentum > 0 and dampening == 0.0 and rng.random() < 0.5
        return "SGD", {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
    betas = rng.choice([(0.9, 0.999), (0.5, 0.9)])
    options = {"betas": betas, "eps": rng.choice([1e-8, 1e-3]), "weight_decay": decay, "amsgrad": rng.random() < 0.3}
    return rng.choice(["Adam", "AdamW"]), options


def _drawn(rng, shape, wild):
    made = torch.tensor([rng.gauss(0, 1) for _ in range(math.prod(shape))], dtype=torch.float32).reshape(shape)
    for _ in range(wild if made.numel() else 0):
        made.view(-1)[rng.randrange(made.numel())] = rng.choice(VALUES)
    return made


def sequences(rng, folder):
    """Steps, gradients that come and go, states saved and loaded, groups added: the same as torch's, or a complaint."""
    name, options = _arguments(rng)
    options |= {"lr": rng.choice([0.0, 0.1, 1e-3]), "maximize": rng.random() < 0.3}
    wild = rng.choice([0, 1, 3])
    start = [_drawn(rng, rng.choice(SHAPES), wild) for _ in range(rng.randrange(1, 4))]
    both = [[torch.nn.Parameter(t.clone()) for t in start] for _ in range(2)]
    made = [getattr(module, name)(own, **options) for module, own in zip((optim, torch.optim), both, strict=True)]
    for _ in range(rng.randrange(1, 7)):
        act = rng.randrange(8)
        if act == 0:
            made = [_reloaded(opt, own) for opt, own in zip(made, both, strict=True)]
        elif act == 1:
            extra = _drawn(rng, rng.choice(SHAPES), wild)
            for opt, own in zip(made, both, strict=True):
                own.append(torch.nn.Parameter(extra.clone()))
                opt.add_param_group({"params": [own[-1]], "weight_decay": 0.0})
        elif act == 2:
            rate = rng.choice([0.0, 0.05])
            for opt in made:
                for group in opt.param_groups:
                    group["lr"] = rate
        grads = [None if rng.random() < 0.2 else _drawn(rng, tuple(p.shape), wild) for p in both[0]]
        for opt, own in zip(made, both, strict=True):
            for p, grad in zip(own, grads, strict=True):
                p.grad = None if grad is None else grad.clone()
            opt.step()
            opt.zero_grad()
    for i, (p, q) in enumerate(zip(*both, strict=True)):
        if not _agree(p.detach(), q.detach()):
            return f"{name} {options}: parameter {i} is {p.tolist()[:8]}, torch's {q.tolist()[:8]}"
    return None


def _reloaded(opt, own):
    """A new optimizer with the state of this one, through its state_dict."""
    fresh = type(opt)([{"params": group["params"]} for group in opt.param_groups], lr=0.5)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    return fresh


def _agree(a, b):
    """Equal to rounding; where values are beyond what fp32 sums to the same, of one kind: finite, infinite or NaN."""
    huge = (a.abs() > 1e28) | (b.abs() > 1e28)
    return torch.equal(a.isnan(), b.isnan()) and torch.allclose(
        a[~huge & ~a.isnan()], b[~huge & ~b.isnan()], rtol=1e-4, atol=1e-5
    )
