"""Pairs of norms from exact per-example gradients: the small batch is one example, the least noisy choice there is.

Of all splits of a batch, single examples give tr(Sigma) the smallest variance (Gray et al. 2024, "Normalization Layer
Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in Transformers").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.noise.feeds import Backward, Shares, counted
from pybatch.noise.norms import squares
from pybatch.noise.per_example.recorder import ExampleRecorder
from pybatch.records import NoiseScale
from pybatch.workloads.running.session import Session

SOURCE = "per-example"


class ExampleFeed:
    """Feeds the estimator from backward passes over micro-batches: one pair for each group of them.

    Args:
        model: as for ExampleRecorder, which raises UsageError for what it can't measure.
        recorder: one already made for this model.
        layers: whether every parameter is in the record.

    Gradients add up in `.grad` over a group, as in gradient accumulation.
    """

    def __init__(self, model: nn.Module, recorder: ExampleRecorder | None = None, layers: bool = True) -> None:
        self.recorder = recorder or ExampleRecorder(model)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.layers = layers
        self.accumulator = NoiseAccumulator(SOURCE, layers=tuple(name for name, _ in self.named) if layers else ())
        self.start()

    def start(self) -> None:
        """Begin a group, with gradients at zero; one that was not finished is forgotten."""
        for _, p in self.named:
            p.grad = None
        self._small: list[Tensor] = []  # per micro-batch: sum of |g_i|^2 of each parameter, by squared weight
        self._squared, self._shares = 0.0, Shares()

    def micro_batch(self, backward: Backward, n: int, weights: Tensor | None = None, batch: Any = None) -> Tensor:
        """As Feed.micro_batch: under watch."""
        scale = self._shares.add(counted(n, weights))
        with self.recorder.record(n, weights=weights) as norms:
            loss = backward(scale)
        squared = norms.weights.square()
        self._small.append(torch.stack([norms.by_parameter[name] @ squared for name, _ in self.named]) / scale**2)
        self._squared += float(n if weights is None else weights.square().sum())
        return loss

    def group(self) -> None:
        """The pair of the micro-batches since the last group; waits for the device."""
        total = self._shares.total
        small = torch.stack(self._small).sum(0) / self._squared
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self.named]
        norms = torch.stack([small, squares(grads) / self._shares.scale**2], dim=1).cpu().numpy()
        sq_small, sq_large = norms.sum(axis=0).tolist()
        layers = norms if self.layers else None
        self.accumulator.update(sq_small, sq_large, self._squared / total, total, layers=layers)
        self.start()

    def outside(self, backward: Callable[[], Tensor], n: int) -> Tensor:
        """As Feed.outside: only passes under watch count."""
        return backward()

    def end(self) -> None:
        """As Feed.end: nothing is held between micro-batches."""

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        return self.accumulator.estimate()


def probed(session: Session, layers: bool = False) -> Callable[[], ExampleFeed]:
    """A maker of feeds for the session's model, after two small batches have shown that it can be measured.

    Raises UsageError, before anything is measured, for a model that can't be, with the reason and the remedy.
    """
    recorder = ExampleRecorder(session.model)
    recorder.probe(lambda n: session.backward(session.batch(n)))
    session.model.zero_grad()
    return partial(ExampleFeed, session.model, recorder, layers)
