"""The arguments of a sweep, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pybatch import scaling
from pybatch.base.errors import UsageError, unknown
from pybatch.sweep.budget import checked_budget
from pybatch.sweep.search import GRIDS, SAMPLERS, Grid, Racing, Sampled, Search, default_rates, load_optuna
from pybatch.training.trajectory import SPLITS, Split
from pybatch.training.trial import Trial
from pybatch.training.unit import initial_losses
from pybatch.training.updates import arguments
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import checked_dtype

MAX_STEPS = 5000


class Plan:
    """The arguments of a sweep, checked."""

    def __init__(
        self,
        workload: Workload,
        *,
        batches: Sequence[int],
        rules: Sequence[str],
        seeds: int,
        seed: int = 0,
        target: Mapping[str, float] | None,
        optimizer: str,
        options: Mapping[str, Any],
        rates: Sequence[float] | None,
        search: str,
        base_batch: int | None,
        base_rate: float | None = None,
        max_steps: int,
        dtype: str,
        gap_epochs: float | None = None,
    ) -> None:
        checked_dtype(dtype)
        self.dtype, self.max_steps = dtype, max_steps
        self.batches = sorted(set(batches))
        if not self.batches or self.batches[0] < 1:
            raise UsageError(f"batches {list(batches)}: give at least one batch size, each 1 or more.")
        self.base_batch = base_batch if base_batch is not None else self.batches[0]
        self.rules = list(dict.fromkeys(rules))
        for rule in self.rules:
            if rule not in scaling.rules():
                raise unknown("rule", rule, scaling.rules())
        if not self.rules:
            raise UsageError("no rule was given. Give at least one, such as 'tuned'.")
        self.base_rate = base_rate
        if base_rate is not None and not 0 < base_rate < float("inf"):
            raise UsageError(f"base rate {base_rate:g}: give a finite learning rate above 0.")
        if base_rate is not None and self.rules == [scaling.SEARCHED]:
            raise UsageError(
                f"base rate {base_rate:g}: rule 'tuned' seeks its own rates. Add a rule that starts from it, such as "
                "'linear', or leave it out."
            )
        if seeds < 1:
            raise UsageError(f"seeds {seeds} is below 1. Give at least 1; 3 show an interval.")
        if not 0 <= seed <= 2**63 - seeds:
            raise UsageError(f"seed {seed} is out of range. Give a whole number from 0 to 2**63 - 1.")
        self.seeds = tuple(range(seed, seed + seeds))
        if max_steps < 1:
            raise UsageError(f"max_steps {max_steps} is below 1. Give the steps after which a trial is given up.")
        self.targets: dict[str, float] = _targets(workload, target)
        self.budget = checked_budget(gap_epochs, workload.examples, self.batches, max_steps)
        self.optimizer = optimizer.lower()
        self.group = arguments(self.optimizer, options)
        self.rates = list(rates) if rates is not None else default_rates(self.optimizer, self.group)
        if not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise UsageError(f"rates {self.rates}: give finite learning rates above 0.")
        self.search = search
        if search not in GRIDS:
            load_optuna(search)
        for rule in self.rules:  # what can be refused is refused before anything runs
            scaling.scale(rule, self.group | {"lr": 1.0}, self.base_batch, scaling.Base(self.base_batch))

    def check_start(self, workload: Workload, device: torch.device) -> None:
        """Raise UsageError where a target is met before the first step: steps to it would say nothing.

        WorkloadError where there is no loss to start from.
        """
        first = self.seeds[0]
        trial = Trial("", self.optimizer, scaling.Scaled(self.group), self.batches[0], first, self.dtype, device.type)
        losses = initial_losses(workload, trial, device)
        for split, target in self.targets.items():
            if losses[split] <= target:
                raise UsageError(
                    f"target {split}={target:g} is met before the first step: the loss starts at {losses[split]:.3g}. "
                    "Give a lower target."
                )

    @property
    def searched(self) -> dict[str, Any]:
        """How rates are tried and how far runs go, as plain JSON types."""
        budget = {} if self.budget is None else {"gap_epochs": self.budget.epochs}
        return {"search": self.search, "rates": self.rates, "max_steps": self.max_steps} | budget

    @property
    def compared(self) -> Split:
        """The split whose target chooses the rates at which test losses are compared."""
        return next(split for split in SPLITS if split in self.targets)

    def searcher(self) -> Search:
        """A search for one batch size."""
        if self.search in SAMPLERS:
            return Sampled(self.search, min(self.rates), max(self.rates), max(len(self.rates), 12), self.seeds[0])
        return Racing(Grid(self.rates)) if self.search == "race" else Grid(self.rates)


def _targets(workload: Workload, target: Mapping[str, float] | None) -> dict[str, float]:
    given = dict(workload.target if target is None else target)
    if not given:
        raise UsageError(f"workload {workload.name!r} names no target loss. Give one, such as train=0.1.")
    for split, loss in given.items():
        if split not in SPLITS:
            raise unknown("target split", split, SPLITS)
        if not loss > float("-inf"):
            raise UsageError(f"target {split}={loss}: give a number.")
    return {split: float(given[split]) for split in SPLITS if split in given}
