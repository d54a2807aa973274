"""Trials of one batch size trained one after another in every step, with pybatch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pybatch.device.generators import seed_generators
from pybatch.scaling import gain
from pybatch.training.pooling import Pooling
from pybatch.training.replicas import Losses, Replicas
from pybatch.training.trajectory import SPLITS, metric_of, split_of
from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.batches import copied
from pybatch.workloads.running.optimizers import Rates
from pybatch.workloads.running.session import Session


class Loop(Replicas):
    """Replicas one after another in every step, with pybatch's own optimizers."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        self.optimizers = [
            session.optimizer_of(trial.optimizer, trial.scaled.group)
            for trial, session in zip(trials, self.sessions, strict=True)
        ]
        self.rated = list(map(Rates, self.optimizers))
        self.gains = [Gain(trial) if trial.scaled.gain_batch else None for trial in trials]

    def advance(self, steps: int) -> None:
        """As `Replicas.advance`."""
        for _ in range(steps):
            batches = self.draw()
            rates = self.rates()
            last = {trial.seed: i for i, trial in enumerate(self.trials)}  # the others leave the batch as it is
            for i, trial in enumerate(self.trials):
                # dropout: the same whatever ran before
                seed_generators(hash((trial.seed, self.done)) % 2**63, self.device)
                session, optimizer, measured = self.sessions[i], self.optimizers[i], self.gains[i]
                batch = batches[trial.seed] if last[trial.seed] == i else copied(batches[trial.seed])
                optimizer.zero_grad()
                factor = 1.0
                if measured is None:
                    session.backward(batch)
                else:
                    factor = measured.backward(session, batch)
                self.update(i, rates[i] * factor)
            self.done += 1
            self.stepped()

    def update(self, i: int, rate: float) -> None:
        """The update of one replica."""
        self.rated[i].set(rate)
        self.sessions[i].update(self.optimizers[i])

    def stepped(self) -> None:
        """All replicas have made a step."""

    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`."""
        self._measure()
        with Pooling():
            train, test = ([float(s.evaluate(batch)) for s in self.sessions] for batch in self.held_out)
        return train, test

    def _measure(self) -> None:
        """The metrics that are wanted, of the fixed batches."""
        for split, batch in zip(SPLITS, self.held_out, strict=True):
            own = [name for name in self.wanted if split_of(name) == split]
            if own:
                rows = [session.metrics(batch, [str(metric_of(name)) for name in own]) for session in self.sessions]
                self.measured |= {name: [row[i] for row in rows] for i, name in enumerate(own)}

    def gradients(self, index: Sequence[int]) -> list[Tensor | None]:
        """As `Replicas.gradients`."""
        each = [[p.grad for p in self.sessions[i].parameters if p.requires_grad] for i in index]
        return [torch.stack(own) if all(g is not None for g in own) else None for own in zip(*each, strict=True)]

    def keep(self, index: Sequence[int]) -> None:
        """As `Replicas.keep`."""
        for name in ("trials", "sessions", "optimizers", "rated", "gains"):
            setattr(self, name, [getattr(self, name)[i] for i in index])
        wanted = {trial.seed for trial in self.trials}
        self.streams = {seed: session for seed, session in self.streams.items() if seed in wanted}


class Gain:
    """The AdaScale gain of one trial, from the gradients of its batch's parts (Johnson et al. 2020, section 3.3)."""

    def __init__(self, trial: Trial) -> None:
        assert trial.scaled.gain_batch is not None
        self.parts = trial.batch // trial.scaled.gain_batch
        self.decay = max(1 - self.parts / 1000, 0.0)
        self.trace = self.grad_sq = self.weight = 0.0

    def backward(self, session: Session, batch: Any) -> float:
        """Leave the mean gradient in `.grad`; returns the gain."""
        parameters, size = session.parameters, len(_first_tensor(batch)) // self.parts
        total: list[Tensor] = []
        square = 0.0
        for part in range(self.parts):
            cut = slice(part * size, (part + 1) * size)
            own = copied(tree_map(lambda leaf, cut=cut: leaf[cut] if _batched(leaf, batch) else leaf, batch))
            session.backward(own)  # parts may have tensors in common
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            square += _square(grads)
            total = grads if not total else [a + g for a, g in zip(total, grads, strict=True)]
            for p in parameters:
                p.grad = None
        for p, g in zip(parameters, total, strict=True):
            p.grad = g / self.parts
        mean_sq = _square([g / self.parts for g in total])
        trace = (square - self.parts * mean_sq) / (self.parts - 1)
        if not math.isfinite(trace):
            return 1.0  # training broke down: the next evaluation says so
        # Bias-corrected means: numerator and denominator separately, debiased by the weight they hold.
        self.trace = self.decay * self.trace + (1 - self.decay) * trace
        self.grad_sq = self.decay * self.grad_sq + (1 - self.decay) * (mean_sq - trace / self.parts)
        self.weight = self.decay * self.weight + (1 - self.decay)
        return gain(self.trace / self.weight, self.grad_sq / self.weight, self.parts)


def _square(tensors: list[Tensor]) -> float:
    return float(sum(n.double().square() for n in torch._foreach_norm(tensors)))


def _first_tensor(batch: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)


def _batched(leaf: Any, batch: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(_first_tensor(batch))
