"""Trials with an anneal or an average of weights, see `training.schedules`: replicas one after another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pybatch.training.loop import Gain, Loop
from pybatch.training.replicas import Losses
from pybatch.training.schedules import GAMMA, OWN, WSD, factor, tail
from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.loss_scale import LossScale
from pybatch.workloads.running.optimizers import rate_of


@dataclass(frozen=True)
class _State:
    """Where all replicas stand: what a branch changes, to go on from again."""

    done: int
    models: list[dict[str, Tensor]]
    optimizers: list[dict[str, Any]]
    gains: list[Gain | None]
    scales: list[LossScale | None]
    generators: dict[int, Tensor]


class Annealed(Loop):
    """Losses at the end of a whole training of the length that `advance` has come to."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        self.schedule, self.length = trials[0].schedule, 0
        self._schedulers: list[Any] = [None] * len(self.trials)
        self._usual = rate_of(self.sessions[0].optimizer())  # what a schedule of the workload's is made for
        self._annealing = 0  # the length that is being annealed; 0: none
        self._start = self._kept()

    def advance(self, steps: int) -> None:
        """As `Replicas.advance`, of the length: only a trunk that lengths share is trained now."""
        self.length += steps
        if self.schedule == WSD:
            super().advance(self.length - tail(self.length) - self.done)

    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`, after the anneal; then the trunk, or the start, is where it was."""
        if not self.length:
            return super().evaluate()
        trunk = self._kept() if self.schedule == WSD else self._start
        if self.schedule == OWN:
            for rates in self.rated:
                rates.set(self._usual)
            self._schedulers = [
                session.schedule(optimizer, self.length)
                for session, optimizer in zip(self.sessions, self.optimizers, strict=True)
            ]
        self._annealing = self.length
        super().advance(self.length - self.done)
        self._annealing = 0
        found = super().evaluate()
        self._put_back(trunk)
        return found

    def rates(self) -> list[float]:
        """As `Replicas.rates`."""
        share = factor(self.schedule, self.done, self._annealing) if self._annealing else 1.0
        return [rate * share for rate in super().rates()]

    def update(self, i: int, rate: float) -> None:
        """As `Loop.update`; a scheduler goes on as it would, and its rates are taken times the trial's over the usual.

        So a schedule that sets rates itself, as OneCycleLR does, is searched like one that multiplies them.
        """
        scheduler, optimizer = self._schedulers[i], self.optimizers[i]
        if scheduler is None:
            super().update(i, rate)
            return
        groups, share = optimizer.param_groups, rate / self._usual
        scheduled = [float(group["lr"]) for group in groups]
        for group, lr in zip(groups, scheduled, strict=True):
            _set(group, lr * share)
        updated = self.sessions[i].update(optimizer)
        for group, lr in zip(groups, scheduled, strict=True):
            _set(group, lr)
        if updated:
            scheduler.step()

    def keep(self, index: Sequence[int]) -> None:
        """As `Replicas.keep`."""
        super().keep(index)
        self._schedulers = [self._schedulers[i] for i in index]
        state = self._start
        self._start = _State(
            state.done,
            [state.models[i] for i in index],
            [state.optimizers[i] for i in index],
            [state.gains[i] for i in index],
            [state.scales[i] for i in index],
            state.generators,
        )

    def _kept(self) -> _State:
        return _State(
            self.done,
            [copy.deepcopy(session.model.state_dict()) for session in self.sessions],
            [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            copy.deepcopy(self.gains),
            [copy.copy(session.scaling) for session in self.sessions],
            {seed: session.generator.get_state() for seed, session in self.streams.items()},
        )

    def _put_back(self, state: _State) -> None:
        self.done, self.gains = state.done, copy.deepcopy(state.gains)
        for i, session in enumerate(self.sessions):
            session.model.load_state_dict(state.models[i])
            self.optimizers[i].load_state_dict(copy.deepcopy(state.optimizers[i]))
            session.scaling = copy.copy(state.scales[i])
        for seed, session in self.streams.items():
            session.generator.set_state(state.generators[seed])


class Averaged(Loop):
    """Losses of an average over the newest weights; training itself goes on at the constant rate."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        self._means = [[p.detach().clone() for p in session.parameters] for session in self.sessions]

    def stepped(self) -> None:
        """As `Loop.stepped`: the newest weights enter the average."""
        new = (GAMMA + 1) / (self.done + GAMMA)
        for session, means in zip(self.sessions, self._means, strict=True):
            torch._foreach_lerp_(means, [p.detach() for p in session.parameters], new)

    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`, of the averages."""
        own = [[p.detach().clone() for p in session.parameters] for session in self.sessions]
        self._load(self._means)
        try:
            return super().evaluate()
        finally:
            self._load(own)

    def keep(self, index: Sequence[int]) -> None:
        """As `Replicas.keep`."""
        super().keep(index)
        self._means = [self._means[i] for i in index]

    @torch.no_grad()
    def _load(self, values: list[list[Tensor]]) -> None:
        for session, own in zip(self.sessions, values, strict=True):
            for p, value in zip(session.parameters, own, strict=True):
                p.copy_(value)


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
