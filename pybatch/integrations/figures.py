"""What is logged of a noise scale, and how an optimizer is made again over another model's parameters."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pybatch.base.errors import UsageError
from pybatch.records import NoiseScale

_LOGGED = ("b_simple", "low", "high", "grad_sq", "trace")


def logged(noise: NoiseScale, prefix: str = "noise/") -> dict[str, float]:
    """The figures of a noise scale that are known, by the names that a tracker shows."""
    values = {name: getattr(noise, name) for name in _LOGGED}
    return {f"{prefix}{name}": float(v) for name, v in values.items() if v is not None and math.isfinite(v)}


def groups_by_place(optimizer: torch.optim.Optimizer, own: Sequence[Tensor]) -> list[dict[str, Any]]:
    """An optimizer's groups, with the places of their parameters among `own` in place of the parameters.

    Raises:
        UsageError: it holds parameters that are not among them.
    """
    places = {id(p): i for i, p in enumerate(own)}
    found = []
    for group in optimizer.param_groups:
        if any(id(p) not in places for p in group["params"]):
            raise UsageError("the optimizer holds parameters that are not those of the model. Make it of its own.")
        settings = {key: value for key, value in group.items() if key != "params"}  # rates may be tensors, which change
        found.append({**copy.deepcopy(settings), "params": [places[id(p)] for p in group["params"]]})
    return found


def made_again(
    kind: type[torch.optim.Optimizer],
    defaults: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    params: Sequence[torch.nn.Parameter],
) -> torch.optim.Optimizer:
    """An optimizer of this class and these `groups_by_place` over other parameters, without a state."""
    taken = inspect.signature(kind).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    arguments = {key: value for key, value in defaults.items() if free or key in taken}
    hidden = ("params", "initial_lr", "param_names")
    own = [
        copy.deepcopy({key: value for key, value in group.items() if key not in hidden and (free or key in taken)})
        | {"params": [params[i] for i in group["params"]]}
        for group in groups
    ]
    return kind(own, **copy.deepcopy(arguments))


def token_weights(batch: Any, ignored: int = -100) -> Tensor | None:
    """Tokens of each example that a loss over labels [n, length] is a mean of; None where there are no such labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    return (labels[:, 1:] != ignored).sum(1)
