"""The update of a whole stack of replicas: parameters [R, ...] with a learning rate for each of the R."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pybatch.base.errors import UsageError
from pybatch.device.memory import upload
from pybatch.optim import FusedOptimizer
from pybatch.workloads.running.choice import is_own
from pybatch.workloads.running.optimizers import optimizer_class, own_group
from pybatch.workloads.running.session import Session


def arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of an optimizer made with these options, all of them arguments it can be made with again.

    A parameter group holds more (AdamW's decoupled_weight_decay) and less (max_grad_norm).

    A sweep has one rate. Muon's matrices and the rest, which AdamW updates, share it: adjust_lr_fn="match_rms_adamw"
    gives Muon's update the root mean square of AdamW's, so that one rate suits both (Liu et al. 2025, section 2.2).
    """
    cls = optimizer_class(name)
    if name.lower() == "muon":
        if options.get("adamw_lr") is not None:
            raise UsageError(
                f"optimizer 'muon': adamw_lr={options['adamw_lr']} is a second rate, and a sweep chooses one for both. "
                "Leave it out: with adjust_lr_fn=match_rms_adamw, which a sweep sets, one rate suits both."
            )
        options = {"adjust_lr_fn": "match_rms_adamw"} | dict(options)
    try:
        made = cls([torch.zeros(1, requires_grad=True)], **options)
    except TypeError as error:
        raise UsageError(f"optimizer {name!r} cannot be made with {dict(options)}: {error}.") from None
    accepted = inspect.signature(cls).parameters
    return {key: value for key, value in made.defaults.items() if key in accepted} | dict(options)


def arguments_of(session: Session, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """As `arguments`; and of the workload's own optimizer, which takes none from outside, its `own_group`."""
    if not is_own(name):
        return arguments(name, options)
    if options:
        raise UsageError(f"optimizer 'own': the workload makes it, and it takes no {sorted(options)[0]}. Leave it out.")
    return own_group(session.own_optimizer())


class Update(ABC):
    """An optimizer over stacked parameters; `keep` drops replicas together with their states."""

    @abstractmethod
    def step(self, params: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """Update the parameters [R, ...] in place by their `.grad`, replica r at the rate lrs[r]."""

    @abstractmethod
    def keep(self, index: Tensor) -> None:
        """Keep the states of these replicas only."""


def update_for(name: str, group: Mapping[str, Any]) -> Update:
    """The batched form of an optimizer where there is one; else the optimizer itself, over views of the stack."""
    plain = not group.get("maximize") and not group.get("amsgrad")
    if name == "sgd" and plain:
        return StackedSGD(group)
    if name == "adamw" and plain:
        return StackedAdamW(group)
    return Views(name, group)


def _per_replica(values: Sequence[float], params: Sequence[Tensor]) -> list[Tensor]:
    """A value for each replica, in a shape for each parameter: one upload for all."""
    made = {
        kind: upload(torch.tensor(values, dtype=kind[0]), kind[1]) for kind in {(p.dtype, p.device) for p in params}
    }
    return [made[p.dtype, p.device].view(-1, *[1] * (p.ndim - 1)) for p in params]


class StackedSGD(Update):
    """`pybatch.optim.SGD` on stacks."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group
        self.buffers: list[Tensor] = []

    def step(self, params: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """As `Update.step`."""
        group, grads = self.group, [p.grad for p in params if p.grad is not None]
        if group["weight_decay"]:  # not in place: parameters that are added to each other have one gradient tensor
            grads = list(torch._foreach_add(grads, list(params), alpha=group["weight_decay"]))
        if group["momentum"]:
            if not self.buffers:
                self.buffers = [g.clone() for g in grads]
            else:
                torch._foreach_mul_(self.buffers, group["momentum"])
                torch._foreach_add_(self.buffers, grads, alpha=1 - group["dampening"])
            if group["nesterov"]:
                grads = list(torch._foreach_add(grads, self.buffers, alpha=group["momentum"]))
            else:
                grads = self.buffers
        for p, g, rate in zip(params, grads, _per_replica([-lr for lr in lrs], params), strict=True):
            p.addcmul_(g, rate)

    def keep(self, index: Tensor) -> None:
        """As `Update.keep`."""
        self.buffers = [b[index] for b in self.buffers]


class StackedAdamW(Update):
    """`pybatch.optim.AdamW` on stacks."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.steps = 0

    def step(self, params: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """As `Update.step`."""
        (beta1, beta2), eps, decay = self.group["betas"], self.group["eps"], self.group["weight_decay"]
        grads = [p.grad for p in params if p.grad is not None]
        if not self.first:
            self.first = [torch.zeros_like(g) for g in grads]
            self.second = [torch.zeros_like(g) for g in grads]
        self.steps += 1
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - beta2)
        root = (1 - beta2**self.steps) ** 0.5
        if decay:
            for p, factor in zip(params, _per_replica([1 - lr * decay for lr in lrs], params), strict=True):
                p.mul_(factor)
        rates = _per_replica([-lr / (1 - beta1**self.steps) for lr in lrs], params)
        for p, m, v, rate in zip(params, self.first, self.second, rates, strict=True):
            p.addcmul_(m / v.sqrt().div_(root).add_(eps), rate)

    def keep(self, index: Tensor) -> None:
        """As `Update.keep`."""
        self.first = [b[index] for b in self.first]
        self.second = [b[index] for b in self.second]


class Views(Update):
    """Any optimizer: parameter groups of a replica's own, whose parameters are its slices of the stacks."""

    def __init__(self, name: str, group: Mapping[str, Any]) -> None:
        self.cls, self.group = optimizer_class(name), group
        self.optimizer: FusedOptimizer | None = None
        self.slices: list[list[Tensor]] = []
        self.source: list[int] = []
        self.states: list[list[dict[str, Any]]] = []

    def step(self, params: Sequence[Tensor], lrs: Sequence[float]) -> None:
        """As `Update.step`."""
        if self.optimizer is None or self.source != [p.data_ptr() for p in params]:
            self._rebuild(params)
        assert self.optimizer is not None
        for p, column in zip(params, zip(*self.slices, strict=True), strict=True):
            assert p.grad is not None
            for piece, grad in zip(column, p.grad.unbind(0), strict=True):
                piece.grad = grad
        groups = self.optimizer.param_groups
        each = len(groups) // len(lrs)  # Muon parts a replica's group in two
        for i, group in enumerate(groups):
            group["lr"] = lrs[i // each]
        self.optimizer.step()

    def keep(self, index: Tensor) -> None:
        """As `Update.keep`."""
        if self.optimizer is not None:
            state = self.optimizer.state
            self.states = [[state[piece] for piece in self.slices[r]] for r in index.tolist()]
            self.optimizer = None

    def _rebuild(self, params: Sequence[Tensor]) -> None:
        self.slices = [[p.detach()[r].requires_grad_() for p in params] for r in range(len(params[0]))]
        self.source = [p.data_ptr() for p in params]
        options = {key: value for key, value in self.group.items() if key != "lr"}
        groups = [{"params": pieces} for pieces in self.slices]
        self.optimizer = self.cls(groups, lr=float(self.group["lr"]), **options)
        for pieces, states in zip(self.slices, self.states, strict=False):
            for piece, state in zip(pieces, states, strict=True):
                self.optimizer.state[piece] = state
        self.states = []
