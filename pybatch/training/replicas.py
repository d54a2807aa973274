"""Trials of one batch size trained in step: what their two forms, `Loop` and `Stack`, have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session, fixed_batches

Losses = tuple[list[float], list[float]]  # train and test, a number for each replica


class Replicas(ABC):
    """Trials of one batch size, all at the same step."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        self.trials, self.device = list(trials), device
        self.batch = trials[0].batch
        self.done = 0  # steps
        self.wanted: tuple[str, ...] = ()  # metrics that `evaluate` takes too, as "test:accuracy"
        self.measured: dict[str, list[float]] = {}  # by it, a number for each replica
        self.streams: dict[int, Session] = {}
        self.sessions = self._made(workload, trials, device)
        for trial, session in zip(trials, self.sessions, strict=True):
            self.streams.setdefault(trial.seed, session)
        self.held_out = fixed_batches(workload, device, trials[0].dtype)

    def _made(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> list[Session]:
        """A session a trial."""
        return [Session(workload, device, t.dtype, t.seed) for t in trials]

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Train every replica for so many steps."""

    @abstractmethod
    def evaluate(self) -> Losses:
        """Losses of the fixed batches, in evaluation mode."""

    @abstractmethod
    def gradients(self, index: Sequence[int]) -> list[Tensor | None]:
        """Of the last step, for these replicas: [replicas, ...] for each parameter that is trained."""

    @abstractmethod
    def keep(self, index: Sequence[int]) -> None:
        """Go on with these replicas only."""

    def rates(self) -> list[float]:
        """Each replica's rate in the step about to be made."""
        return [trial.scaled.lr(self.done) for trial in self.trials]

    def draw(self) -> dict[int, Any]:
        """The next batch of every seed."""
        return {seed: session.batch(self.batch) for seed, session in self.streams.items()}
