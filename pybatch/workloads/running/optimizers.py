"""The optimizer that a workload is trained with: one asked for by name, the workload's own, or pybatch's AdamW.

A rate asked for goes before the workload's: that of the first group of its own optimizer, else `learning_rate`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pybatch import optim
from pybatch.base.errors import UsageError, WorkloadError, unknown
from pybatch.workloads.base import Workload
from pybatch.workloads.running.choice import OptimizerChoice, is_own, is_plain, told

Call = Callable[..., Any]  # of a method of the workload by its name, checked


def optimizer_class(name: object) -> Any:
    """A pybatch optimizer by its name in any case; raises UsageError for another."""
    known = {entry.lower(): entry for entry in optim.__all__ if entry != "FusedOptimizer"}
    if not isinstance(name, str):
        what = name.__name__ if isinstance(name, type) else type(name).__name__
        raise UsageError(f"optimizer {what} is no name. Give one of: {', '.join(known)}.")
    if name.lower() not in known:
        raise unknown("optimizer", name, known)
    return getattr(optim, known[name.lower()])


def named(name: str, parameters: Sequence[Tensor], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A pybatch optimizer by its name; raises UsageError for arguments that it cannot be made with."""
    cls = optimizer_class(name)
    if unfit := sorted(set(options) - set(inspect.signature(cls).parameters)):
        raise unknown(f"optimizer {name!r}: argument", unfit[0], list(inspect.signature(cls).parameters)[1:])
    try:
        made: torch.optim.Optimizer = cls(parameters, **options)
    except (TypeError, ValueError) as error:
        text = str(error).rstrip(".")
        raise UsageError(f"optimizer {name!r} cannot be made with {dict(options)}: {text}.") from None
    return made


def has_own(workload: Workload) -> bool:
    """Whether the workload brings an optimizer of its own."""
    return workload.brings("optimizer")


def adjusted(workload: Workload, choice: OptimizerChoice, reference_batch: int | None = None) -> Workload:
    """The workload with what a user asks for before its own; the one given stays as it is."""
    changed = copy.copy(workload)
    if reference_batch is not None:
        changed.reference_batch = reference_batch
    changed.asked_optimizer = choice
    return changed


def own(workload: Workload, parameters: Sequence[Tensor], call: Call) -> torch.optim.Optimizer | None:
    """What the workload's own `optimizer()` gives, checked; None where it has none.

    Raises:
        WorkloadError: it is no optimizer, not of these parameters, needs a closure, or its groups have no rate.
    """
    made = call("optimizer", list(parameters)) if has_own(workload) else None
    if made is None:
        return None

    def refused(what: str) -> WorkloadError:
        return WorkloadError(f"{type(workload).__name__}.optimizer() of workload {workload.name!r} {what}")

    if not isinstance(made, torch.optim.Optimizer):
        raise refused(f"returned {type(made).__name__}: give a torch.optim.Optimizer.")
    given = set(map(id, parameters))
    if any(id(p) not in given for group in made.param_groups for p in group["params"]):
        raise refused("holds parameters that are not of the model at hand: make it of the `params` it is given.")
    if _needs_closure(made):
        raise refused(f"returned {type(made).__name__}, whose step() needs a closure: give one that steps without.")
    rates = [group.get("lr") for group in made.param_groups]
    if not all(isinstance(rate, float | int | Tensor) and float(rate) > 0 for rate in rates):
        raise refused(f"returned {type(made).__name__} with rates {rates}: give each group an lr above 0.")
    return made


def make(
    workload: Workload, parameters: Sequence[Tensor], call: Call, *, still: bool = False, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that this workload is trained with.

    Args:
        workload: as `adjusted`, or as it is.
        parameters: of the model at hand.
        call: of a method of the workload.
        still: at a rate of 0, so that steps change no parameter.
        capturable: for CUDA graphs, with its step count on the device.

    Raises:
        UsageError: an optimizer asked for that cannot be made, or not be captured. WorkloadError: see `own`.
    """
    choice = workload.asked_optimizer or OptimizerChoice()
    if choice.name is not None:
        lr = choice.lr if choice.lr is not None else _own_rate(workload, parameters, call)
        made = named(choice.name, parameters, {**choice.options, "lr": lr})
    elif (brought := own(workload, parameters, call)) is not None:
        made = brought
        if choice.lr is not None:
            Rates(made).set(choice.lr)
    else:
        lr = choice.lr if choice.lr is not None else workload.learning_rate
        made = named("adamw", parameters, {"lr": lr, "capturable": capturable})
    for group in made.param_groups:
        if capturable and "capturable" not in group:
            raise UsageError(f"--cuda-graph (graph=True): {type(made).__name__} cannot be captured. Leave it out.")
        if capturable:
            group["capturable"] = True
    if still:
        Rates(made).set(0.0)
    return made


def public(name: str, optimizer: torch.optim.Optimizer) -> str:
    """What a record calls it."""
    return type(optimizer).__name__.lower() if is_own(name) else name.lower()


def own_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its plain hyper-parameters, and the rate of its first group."""
    return plain(optimizer.defaults) | {"lr": rate_of(optimizer)}


def of_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The workload's own optimizer with a group that a rule made of its `own_group`: what the rule left as it was
    stays as each of its groups has it."""
    before = own_group(optimizer)
    for each in optimizer.param_groups:
        each.update({k: v for k, v in group.items() if k != "lr" and k in each and v != before.get(k)})
    Rates(optimizer).set(group["lr"])
    return optimizer


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the first group."""
    return float(optimizer.param_groups[0]["lr"])


def described(workload: Workload, parameters: Sequence[Tensor], call: Call) -> tuple[str, dict[str, str], float]:
    """The optimizer's class in lower case, the arguments that were chosen, and the rate: for the record."""
    made = make(workload, parameters, call)
    choice = workload.asked_optimizer or OptimizerChoice()
    chosen = choice.options if choice.name is not None else plain(made.defaults) if has_own(workload) else {}
    return type(made).__name__.lower(), {key: told(value) for key, value in chosen.items()}, rate_of(made)


def plain(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of an optimizer that are numbers, or tuples of them; but the rate."""
    return {key: value for key, value in defaults.items() if key != "lr" and is_plain(value)}


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of its state."""
    return [leaf for state in optimizer.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


class Rates:
    """The rates of an optimizer's groups, moved together: each keeps its ratio to that of the first group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer  # whose groups load_state_dict replaces
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._ratios = [rate / rates[0] if rates[0] else 1.0 for rate in rates]

    def set(self, lr: float) -> None:
        """Give the first group this rate, and the others theirs."""
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio


def _own_rate(workload: Workload, parameters: Sequence[Tensor], call: Call) -> float:
    brought = own(workload, parameters, call)
    return rate_of(brought) if brought is not None else workload.learning_rate


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() has a closure without a default, as LBFGS has."""
    found = inspect.signature(type(optimizer).step).parameters.get("closure")
    return found is not None and found.default is inspect.Parameter.empty
