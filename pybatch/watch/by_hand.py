"""Trainings that update their parameters by hand, without an optimizer of torch: they are given one that does nothing.

Its step is called where the script's own is over: before the first forward pass after its gradients were cleared. So
all that watches an optimizer watches such a training too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pybatch.noise.hooks import after_forward, before_forward
from pybatch.noise.outputs import leaves_in

BACKWARDS = 8  # backward passes of one model with no optimizer's step, after which its update is taken to be by hand


class ByHand(torch.optim.Optimizer):
    """An optimizer that changes nothing, of the parameters that a script updates itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self._first: Tensor | None = None
        self._passed = self._late = self._kept = False
        self._hooks = (
            before_forward(model, self._enter),
            after_forward(model, self._leave),
        )

    def remove(self) -> None:
        """Follow the script no more."""
        for hook in self._hooks:
            hook.remove()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: the script has updated its parameters."""

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether another optimizer updates some of these parameters."""
        own = {id(p) for group in self.param_groups for p in group["params"]}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _cleared(self) -> bool:
        if self._first is None:
            self._first = next((p for group in self.param_groups for p in group["params"] if p.grad is not None), None)
        if self._first is None or self._first.grad is None:
            return True
        return not bool(self._first.grad.any())

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._passed or not torch.is_grad_enabled() or not module.training:
            return
        self._kept = not self._cleared()
        if self._late or not self._kept:
            self._passed = False
            type(self).step(self)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        first = next((v for v in leaves_in(output) if isinstance(v, Tensor) and v.requires_grad), None)
        if first is not None:
            first.register_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, gradient: Tensor) -> None:
        if self._passed and self._kept and self._cleared():
            self._late = True  # gradients are cleared between the forward and the backward pass
        self._passed = True
