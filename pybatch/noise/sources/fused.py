"""The handle of a fused optimizer, which takes the norms of micro-batches in its own pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from pybatch.base.errors import UsageError
from pybatch.noise.handle import Handle
from pybatch.noise.hooks import before_forward
from pybatch.noise.loss import Loss
from pybatch.optim import FusedOptimizer
from pybatch.records import NoiseScale


class OptimizerNoise(Handle):
    """Reads `opt.noise`; counts and state are the optimizer's own, and `unit` says what it was given to count."""

    def __init__(self, optimizer: FusedOptimizer, unit: str | None = None) -> None:
        _ = optimizer.noise  # refuses an optimizer made without noise=True
        self._optimizer, self._unit = optimizer, unit

    @property
    def noise(self) -> NoiseScale:
        return dataclasses.replace(self._optimizer.noise, unit=self._unit)

    def count(self, n: float) -> None:
        raise UsageError(f"count({n!r}): a fused optimizer counts in opt.accumulate(n). Leave the call out.")

    def detach(self) -> None:
        """Nothing to take off: the optimizer goes on measuring."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the statistics are in the optimizer's own state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise UsageError(
                "a fused optimizer keeps the statistics in its own state. Load optimizer.load_state_dict()."
            )


class FusedLoop(Handle):
    """A fused optimizer's own norms, until its first step shows that nobody calls `accumulate`: then another source.

    Args:
        own: reads the optimizer.
        model, optimizer: what is trained.
        other: makes the source that takes over, and what to call in the forward pass that is under way.
    """

    def __init__(
        self,
        own: OptimizerNoise,
        model: nn.Module,
        optimizer: FusedOptimizer,
        other: Callable[[], tuple[Handle, Callable[..., None]]],
    ) -> None:
        self.current: Handle = own
        self._other = other
        self._stepped = False
        optimizer.warns = False
        # An optimizer's hooks may not be changed while it runs them, so the next forward pass decides.
        self._loss = Loss(model)
        self._hooks: list[Any] = [
            optimizer.register_step_post_hook(self._step),
            before_forward(model, self._look, with_kwargs=True),
        ]
        self._optimizer = optimizer

    def _step(self, *_: Any) -> None:
        self._stepped = True

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._optimizer.accumulates:
            self._settle()
        elif self._stepped:
            self._settle()
            self._loss.remove()  # the other looks for itself
            self.current, began = self._other()
            began(module, args, kwargs)

    def _settle(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def noise(self) -> NoiseScale:
        found = self.current.noise
        if not isinstance(self.current, OptimizerNoise):
            return found
        # How many labels a micro-batch had is what the user may have given to accumulate(n).
        return dataclasses.replace(found, notes=(*found.notes, *self._loss.notes(None)))

    def count(self, n: float) -> None:
        self.current.count(n)

    def detach(self) -> None:
        self._settle()
        self._loss.remove()
        self.current.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.current.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and isinstance(self.current, OptimizerNoise) and not self._optimizer.accumulates:
            self._settle()
            self.current, _ = self._other()
        self.current.load_state_dict(state)
