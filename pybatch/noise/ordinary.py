"""The ordinary loop, one backward pass a step: micro-batches give no pair of norms, so another source takes over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.noise.handle import Collector, Handle
from pybatch.noise.hooks import before_forward, transformed
from pybatch.noise.sources.adam_moments import MomentsNoise
from pybatch.noise.sources.examples import ExampleNoise
from pybatch.noise.sources.micro_batches import MicroBatchNoise
from pybatch.records import NoiseScale

SINGLE = 3  # steps of one backward pass each, after which a loop is taken for an ordinary one
REMEDIES = (
    "Make two or more backward passes over parts of the batch before each optimizer.step(); or train with Adam or "
    "AdamW and attach(..., source='adam-moments'); or give the training as a Workload to pybatch.measure_noise"
)


class OrdinaryLoop(Handle):
    """Micro-batches, until a loop shows that it has one a step: then what the model or the optimizer offers.

    Exact per-example norms of every tenth step where all layers are known, else Adam's moments, else a warning with the
    remedies by name.

    Args:
        micro: the source begun with.
        model: what is trained.
        offers: makers of the others in their order, each of which raises UsageError where it can't be had.
    """

    def __init__(
        self,
        micro: MicroBatchNoise,
        model: nn.Module,
        offers: dict[str, Callable[[], Collector]],
    ) -> None:
        self.current: Collector = micro
        self._offers = offers
        self._reasons: list[str] = []  # why those tried can't be had
        self._model = model
        self._watch()

    def _watch(self) -> None:
        """Look where a forward pass begins: an optimizer's hooks may not be changed while it runs them.

        After the source's own hooks, as those of a model are all run, also one that was just removed.
        """
        self._hook: Any = before_forward(self._model, self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training or not torch.is_grad_enabled() or transformed():
            return
        before = self.current
        self._decide()
        if self.current is not before:
            self._settled()
            self._watch()
            self.current.begin(module, args, kwargs)

    def _decide(self) -> None:
        current = self.current
        if isinstance(current, MicroBatchNoise):
            if current.pairs:
                self._settled()
            elif current.singles >= SINGLE:
                self._switch()
        elif isinstance(current, ExampleNoise):
            if current.refused is not None:
                self._reasons.append(str(current.refused).removesuffix("."))
                self._switch()
        else:
            self._settled()

    def _settled(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _switch(self) -> None:
        """To the next source that can be had."""
        while self._offers:
            source = next(iter(self._offers))
            if self._become(source):
                return
        self._settled()
        why = "; ".join(self._reasons)
        warnings.warn(
            f"pybatch.noise.attach(): the first steps had one backward pass each, which gives no pair of norms, and "
            f"neither model nor optimizer offers another source ({why}). {REMEDIES}.",
            stacklevel=2,
        )

    def _become(self, source: str) -> bool:
        make = self._offers.pop(source)
        try:
            found = make()
        except UsageError as error:
            self._reasons.append(str(error).removesuffix("."))
            return False
        self.current.detach()
        self.current = found
        return True

    @property
    def source(self) -> str:
        """Where the norms come from now."""
        return self.current.source

    @property
    def noise(self) -> NoiseScale:
        return self.current.noise

    @property
    def whole(self) -> NoiseScale:
        """As `Collector.whole`."""
        return self.current.whole

    def count(self, n: float) -> None:
        self.current.count(n)

    def detach(self) -> None:
        self._settled()
        self.current.detach()

    def state_dict(self) -> dict[str, Any]:
        return self.current.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        source = state.get("source")
        if isinstance(source, str) and source in self._offers and isinstance(self.current, MicroBatchNoise):
            self._become(source)
        self.current.load_state_dict(state)


def offers(
    model: nn.Module, optimizer: torch.optim.Optimizer, common: dict[str, Any], scaler: Any
) -> dict[str, Callable[[], Collector]]:
    """The sources that an ordinary loop may turn to."""

    def examples() -> Collector:
        return ExampleNoise(model, optimizer, **common, scaler=scaler, yielding=True)

    def moments() -> Collector:
        return MomentsNoise(model, optimizer, **common)

    return {"per-example": examples, "adam-moments": moments}
