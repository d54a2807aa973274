"""What turns backward passes at fixed parameters into pairs of norms, for `measure_noise`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pybatch.noise.backward import BackwardNoise
from pybatch.noise.preconditioner import EXPERIMENTAL
from pybatch.optim import SGD
from pybatch.records import NoiseScale


class Feed(Protocol):
    """What turns the backward passes of a group into a pair of norms."""

    def start(self) -> None:
        """Begin a group, forgetting one that was not finished."""

    def micro_batch(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """Run the backward pass of n examples and take what is needed of it; returns its loss."""

    def group(self) -> None:
        """Take the pair of the micro-batches since `start`."""

    def end(self) -> None:
        """Let go of the model; `noise` stays readable."""

    @property
    def noise(self) -> NoiseScale:
        """The noise scale of all groups so far."""


class OptimizerFeed:
    """Norms of the micro-batches' gradients and of their mean, by the fused optimizer's own pass."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.optimizer = SGD(parameters, lr=0.0, noise=True)
        self.start = self.optimizer.zero_grad

    def micro_batch(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """As Feed.micro_batch."""
        loss = backward()
        self.optimizer.accumulate(n)
        return loss

    def group(self) -> None:
        """As Feed.group."""
        self.optimizer.step()

    def end(self) -> None:
        """As Feed.end: nothing is held."""

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        return self.optimizer.noise


class HookFeed:
    """The same norms by hooks on the parameters, which also see each of them, and Adam's moments."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layers: bool, preconditioned: bool
    ) -> None:
        notes = (EXPERIMENTAL,) if preconditioned else ()
        self.model = model
        # The optimizer is never stepped: it lends its moments, and `close` is called in place of its step.
        self.handle = BackwardNoise(
            model,
            optimizer,
            layers=layers,
            preconditioned=preconditioned,
            examples="count",
            accumulation="sum",
            notes=notes,
        )

    def start(self) -> None:
        """As Feed.start."""
        self.model.zero_grad()
        self.handle.forget()

    def micro_batch(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """As Feed.micro_batch."""
        self.handle.count(n)
        return backward()

    def group(self) -> None:
        """As Feed.group."""
        self.handle.close()

    def end(self) -> None:
        """As Feed.end: its hooks would take the passes of the next feed for uncounted ones of its own."""
        self.handle.detach()

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        return self.handle.noise
