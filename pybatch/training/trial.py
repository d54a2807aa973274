"""A trial: one training run, named by everything that defines it, and what came of it. No torch here.

How long a trial runs is no part of its name. A longer run of a trial begins with the shorter one, so one stored run
answers every target and every cap it went far enough for; `answers` says whether it did.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from pybatch.base.codec import parse
from pybatch.scaling import Scaled
from pybatch.training.trajectory import Crossing, Trajectory

DIVERGED = 3.0  # times the initial loss, once warm-up and GRACE steps are over
GRACE = 16  # steps: a run at a high rate may overshoot at once and then settle
SLACK = 1.5  # times the best rate's median steps, after which its own late seeds are given up, and every other rate
FACTOR = 4.0  # times the steps at the base batch, or tuned ones, after which a rule is taken to have failed

End = Literal["met", "capped", "diverged"]
Targets = Mapping[str, float]  # split -> loss


def rounded(rate: float) -> float:
    """A learning rate to six digits: the same name for one that is reached by different arithmetic."""
    return float(f"{rate:.6g}")


@dataclass(frozen=True)
class Trial:
    """One training run: batches drawn with replacement in an order of the seed's own, from the seed's own model.

    Its rate is `rounded` here, for whichever rule asks for it: one rate has one key, and is trained once.
    """

    workload: str  # fingerprint: class, model, dials, data
    optimizer: str
    scaled: Scaled
    batch: int
    seed: int
    dtype: str
    device: str  # kind: "cpu", "cuda"
    schedule: str = "constant"  # of `training.schedules.SCHEDULES`

    def __post_init__(self) -> None:
        group = {**self.scaled.group, "lr": rounded(self.scaled.group["lr"])}
        object.__setattr__(self, "scaled", replace(self.scaled, group=group))

    @cached_property
    def spec(self) -> str:
        """What defines this trial, as JSON with sorted keys."""
        flat = {one.name: getattr(self, one.name) for one in fields(self)}  # a store holds thousands: without copies
        flat["scaled"] = {one.name: getattr(self.scaled, one.name) for one in fields(self.scaled)}
        return json.dumps(flat, sort_keys=True)

    @cached_property
    def key(self) -> str:
        """Content hash (SHA-256, hex) of `spec`."""
        return hashlib.sha256(self.spec.encode()).hexdigest()

    @property
    def lr(self) -> float:
        """The rate after warm-up, without an AdaScale gain."""
        return float(self.scaled.group["lr"])

    @staticmethod
    def from_spec(spec: str) -> Trial:
        """The trial a `spec` was written from."""
        data: dict[str, Any] = parse(spec)
        return Trial(**(data | {"scaled": Scaled(**data["scaled"])}))


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. `met`: every target it was run for was reached; `capped`: given up before that."""

    trial: Trial
    end: End
    trajectory: Trajectory
    seconds: float  # of this trial: its share where several were trained together
    how: str = "loop"  # "stacked" or "loop"

    @property
    def steps(self) -> int:
        """Steps run."""
        return int(self.trajectory.steps[-1])

    def answers(self, targets: Targets, limits: Mapping[str, float]) -> bool:
        """Whether it ran far enough: it diverged, or each target was reached or its limit of steps passed."""
        if not all(map(self.trajectory.has, targets)):
            return False
        return self.end == "diverged" or all(
            self.steps >= limits[split] or self.trajectory.crossing(split, target) is not None
            for split, target in targets.items()
        )


def diverged(step: int, loss: float, initial: float, warmup_steps: int) -> bool:
    """Whether a train loss means that training broke down."""
    if not math.isfinite(loss):
        return True
    return step >= warmup_steps + GRACE and loss > DIVERGED * initial


def middle(values: Iterable[float]) -> float:
    """Median in which infinity is a value; of an even number, the lower middle one where the upper is infinite."""
    ordered = sorted(values)
    if not ordered:
        return math.inf
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if math.isinf(high) else (low + high) / 2


@dataclass
class Study:
    """Trials of one batch size that are compared: when each of them reached each target.

    A rate that takes SLACK times the best one's steps cannot be the best, nor one that takes `margin` times them where
    less is beyond noise: it is given up then, and counts as one that takes longer. `cap` bounds every trial. Without
    `search` there is nothing to compare with, and the cap alone ends a trial.
    """

    targets: dict[str, float]
    seeds: Sequence[int]
    cap: int
    search: bool = True
    margin: float = SLACK  # times the best rate's median steps, after which the others are given up
    # split -> rate -> seed -> the crossing
    found: dict[str, dict[float, dict[int, Crossing]]] = field(default_factory=dict)
    ended: dict[tuple[float, int], Outcome] = field(default_factory=dict)  # (rate, seed) -> what came of the trial

    def record(self, split: str, lr: float, seed: int, crossing: Crossing) -> None:
        """One trial reached one target."""
        self.found.setdefault(split, {}).setdefault(lr, {})[seed] = crossing

    def take(self, outcome: Outcome) -> None:
        """All that a finished trial reached."""
        self.ended[outcome.trial.lr, outcome.trial.seed] = outcome
        for split, target in self.targets.items():
            if not outcome.trajectory.has(split):
                continue  # it was run for another target, and is run again
            if (crossing := outcome.trajectory.crossing(split, target)) is not None:
                self.record(split, outcome.trial.lr, outcome.trial.seed, crossing)

    def forget(self, lr: float, seed: int) -> None:
        """A trial that has not ended begins anew: what it reached until now is reached again."""
        for rates in self.found.values():
            rates.get(lr, {}).pop(seed, None)

    def limit(self, split: str, lr: float | None = None) -> float:
        """Steps up to which a crossing counts for this split's target; those after which a trial of rate `lr` ends."""
        if not self.search:
            return float(self.cap)
        best = min((self._upper(split, rate) for rate in self.found.get(split, {})), default=math.inf)
        behind = lr is not None and self._upper(split, lr) > best
        return min(float(self.cap), self.margin * best if behind else max(SLACK * best, best + 1))

    def _upper(self, split: str, lr: float) -> float:
        """The upper middle of a rate's steps: one of two seeds must not cut the other one off."""
        crossings = self.found.get(split, {}).get(lr, {})
        steps = sorted(crossings[seed].steps if seed in crossings else math.inf for seed in self.seeds)
        return steps[len(steps) // 2]

    def limits(self, lr: float | None = None) -> dict[str, float]:
        """The limit of each target's split."""
        return {split: self.limit(split, lr) for split in self.targets}

    def median(self, split: str, lr: float) -> float:
        """Median steps of a rate over the seeds, infinite where fewer than half have reached the target."""
        crossings = self.found.get(split, {}).get(lr, {})
        return middle(crossings[seed].steps if seed in crossings else math.inf for seed in self.seeds)

    def rank(self, split: str, lr: float) -> tuple[bool, float]:
        """What rates are chosen by: the median, behind all others where it stands on half of the seeds alone.

        A run that never reaches must not serve a rate better than one that reaches late.
        """
        return math.isinf(self._upper(split, lr)), self.median(split, lr)

    def steps(self, split: str, lr: float, seed: int) -> Crossing | None:
        """The crossing of one trial, where it came before this study's limit."""
        crossing = self.found.get(split, {}).get(lr, {}).get(seed)
        return crossing if crossing is not None and crossing.steps <= self.limit(split) else None

    def over(self, lr: float, seed: int, step: int) -> bool:
        """Whether a trial at this step has nothing left to show."""
        return all(
            seed in self.found.get(split, {}).get(lr, {}) or step >= self.limit(split, lr) for split in self.targets
        )

    def met(self, lr: float, seed: int) -> bool:
        """Whether a trial has reached every target."""
        return all(seed in self.found.get(split, {}).get(lr, {}) for split in self.targets)


@dataclass(frozen=True)
class Task:
    """Trials of one batch size and optimizer that may be trained together: what a worker is given."""

    trials: tuple[Trial, ...]
    targets: dict[str, float]
    seeds: tuple[int, ...]  # of the whole study
    cap: int
    search: bool = True
    margin: float = SLACK  # see `Study`
    known: tuple[Outcome, ...] = ()  # of the same study, from earlier
    metrics: bool = False  # whether the workload's metrics are taken: all of them, as some target names one

    def study(self) -> Study:
        """The study as it stands before this task runs."""
        study = Study(dict(self.targets), self.seeds, self.cap, self.search, self.margin)
        for outcome in self.known:
            study.take(outcome)
        return study
