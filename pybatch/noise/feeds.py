"""What turns the backward passes of a group into a pair of norms, for `measure_noise`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from pybatch.noise.preconditioner import EXPERIMENTAL
from pybatch.noise.sources.micro_batches import MicroBatchNoise
from pybatch.optim import SGD
from pybatch.records import NoiseScale

Backward = Callable[[float], torch.Tensor]  # a backward pass of so many times the loss; returns the loss itself


class Feed(Protocol):
    """What turns the backward passes of a group into a pair of norms."""

    def start(self) -> None:
        """Begin a group, forgetting one that was not finished."""

    def micro_batch(
        self, backward: Backward, n: int, weights: torch.Tensor | None = None, batch: Any = None
    ) -> torch.Tensor:
        """Run the backward pass of n examples and take what is needed of it; returns its loss.

        Args:
            backward: of the mean over the examples, or of one weighted by `weights`.
            n: examples.
            weights: what each counts for, float64 [n] on the CPU; None: all alike, and n the same for a whole group.
            batch: what `backward` is of, for a feed that takes it apart.
        """

    def group(self) -> None:
        """Take the pair of the micro-batches since `start`."""

    def outside(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """Run a backward pass of n examples between groups, of which no pair is made; returns its loss."""

    def end(self) -> None:
        """Let go of the model; `noise` stays readable."""

    @property
    def noise(self) -> NoiseScale:
        """The noise scale of all groups so far, counted as the micro-batches were."""


class Shares:
    """What the micro-batches of a group count for: the factor of each one's loss, and of their sum."""

    def __init__(self) -> None:
        self.total, self._first = 0.0, 0.0

    def add(self, count: float) -> float:
        """A micro-batch that counts for so much; returns its loss's factor, 1 for the first."""
        self._first = self._first or count
        self.total += count
        return count / self._first

    @property
    def scale(self) -> float:
        """So many times the weighted mean are the gradients added up with these factors."""
        return self.total / self._first


def counted(n: int, weights: torch.Tensor | None) -> float:
    """What a micro-batch counts for."""
    return float(n) if weights is None else float(weights.sum())


class OptimizerFeed:
    """Norms of the micro-batches' gradients and of their mean, by the fused optimizer's own pass.

    Args:
        model: its parameters that require a gradient are measured.
        layers: whether each of them is in the record; the optimizer has them anyway.
    """

    def __init__(self, model: torch.nn.Module, layers: bool = False) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer, self.layers = SGD(named, lr=0.0, noise=True), layers
        self.start = self.optimizer.zero_grad

    def micro_batch(
        self, backward: Backward, n: int, weights: torch.Tensor | None = None, batch: Any = None
    ) -> torch.Tensor:
        """As Feed.micro_batch."""
        loss = backward(1.0)
        self.optimizer.accumulate(counted(n, weights))
        return loss

    def group(self) -> None:
        """As Feed.group."""
        self.optimizer.step()

    def outside(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """As Feed.outside: a pass counts only where `accumulate` follows."""
        return backward()

    def end(self) -> None:
        """As Feed.end: nothing is held."""

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        found = self.optimizer.whole_noise
        return found if self.layers else dataclasses.replace(found, layers=())


class HookFeed:
    """The same norms by hooks on the parameters, which also see Adam's moments: for `preconditioned`."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layers: bool = False) -> None:
        self.model = model
        # The optimizer is never stepped: it lends its moments, and `close` is called in place of its step.
        self.handle = MicroBatchNoise(
            model,
            optimizer,
            layers=layers,
            preconditioned=True,
            examples="count",
            accumulation="weighted",
            notes=(EXPERIMENTAL,),
        )
        self.shares = Shares()

    def start(self) -> None:
        """As Feed.start."""
        self.model.zero_grad()
        self.handle.forget()
        self.shares = Shares()

    def micro_batch(
        self, backward: Backward, n: int, weights: torch.Tensor | None = None, batch: Any = None
    ) -> torch.Tensor:
        """As Feed.micro_batch."""
        count = counted(n, weights)
        self.handle.count(count)
        return backward(self.shares.add(count))

    def group(self) -> None:
        """As Feed.group."""
        self.handle.close(scale=self.shares.scale)

    def outside(self, backward: Callable[[], torch.Tensor], n: int) -> torch.Tensor:
        """As Feed.outside: the hooks see the pass, and forget it before the optimizer's step could close it."""
        self.handle.count(float(n))
        loss = backward()
        self.handle.forget()
        return loss

    def end(self) -> None:
        """As Feed.end: its hooks would take the passes of the next feed for uncounted ones of its own."""
        self.handle.detach()

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        return self.handle.whole
