"""Running a task of trials to its targets."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from pybatch.base.errors import PybatchError, WorkloadError
from pybatch.device.generators import forked
from pybatch.training.choosing import StackTooLargeError, choose, chunks, memory_for
from pybatch.training.loop import Loop
from pybatch.training.replicas import Replicas
from pybatch.training.schedules import next_length
from pybatch.training.stack import Stack
from pybatch.training.trajectory import SPLITS, Metric, Trajectory, crossing_at, signed, smoothed
from pybatch.training.trial import End, Outcome, Study, Task, Trial, diverged
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.session import Session, is_out_of_memory
from pybatch.workloads.running.sharing import State, changes, state

Deliver = Callable[[Outcome], None]


class _StackError(Exception):
    """A stack failed on its way: at the workload's fault or at vmap's, which a loop tells apart."""


def run_task(
    workload: Workload,
    task: Task,
    deliver: Deliver,
    *,
    device: torch.device,
    how: Literal["stacked", "loop"] | None = None,
    progress: Progress | None = None,
) -> str | None:
    """Train every trial of a task; each outcome is delivered as soon as it is known.

    Args:
        workload: what is trained; its fingerprint is that of the trials.
        task: the trials, their targets and caps.
        deliver: called with each outcome, once a trial.
        device: where.
        how: "stacked" or "loop"; None measures which is faster.
        progress: called with (what is being done, share done).

    Returns:
        Why the trials were not stacked, where they could not be; else None.
    """
    if not task.trials:
        return None
    least = {
        outcome.trial.key: outcome.steps for outcome in task.known
    }  # one that runs again is no shorter than it was
    if task.metrics:  # a stack has no models to take them of
        how = "loop"
    study, ended, made = task.study(), set[str](), [0]
    first = Session(workload, torch.device("cpu"), task.trials[0].dtype, task.trials[0].seed)
    size = sum(p.numel() * p.element_size() for p in first.parameters)
    reason, split = None, next(iter(task.targets))

    def delivered(outcome: Outcome) -> None:
        ended.add(outcome.trial.key)
        deliver(outcome)

    def say(step: int, left: int, loss: float) -> None:
        made[0] = max(made[0], step)
        if progress is not None:
            text = f"trials: batch {task.trials[0].batch}, step {step}, {left} of {len(task.trials)} left"
            progress(f"{text}, {split} loss {loss:.3g}", len(ended) / len(task.trials))

    def trained(group: list[Trial]) -> str | None:
        replicas, why = choose(workload, group, device, how)
        _Training(replicas, study, delivered, task.cap, task.metrics, least).run(say)
        return why

    try:
        with forked(device):
            groups = deque(chunks(task.trials, size, memory_for(device)))
            while groups:
                group, failed = groups.popleft(), None
                try:
                    reason = trained(group) or reason
                    continue
                except StackTooLargeError as error:
                    if how is not None:
                        raise error.__cause__ or error from None
                except _StackError as error:
                    if how is not None:
                        raise error.__cause__ or error from None
                    failed = f"not stacked to the end: {error}"
                # Here no trace holds what the stack held.
                rest = [trial for trial in group if trial.key not in ended]
                for trial in rest:
                    study.forget(trial.lr, trial.seed)
                if failed is not None:
                    reason = failed
                    _Training(Loop(workload, rest, device), study, delivered, task.cap, task.metrics, least).run(say)
                else:
                    left, half = [trial for some in (rest, *groups) for trial in some], (len(group) + 1) // 2
                    groups = deque(left[i : i + half] for i in range(0, len(left), half))  # nor would the others fit
    except WorkloadError as error:
        error.begun |= made[0] > 0
        raise
    return reason


class _Training:
    """One group of replicas on its way to the targets, at most to step `cap`."""

    def __init__(
        self,
        replicas: Replicas,
        study: Study,
        deliver: Deliver,
        cap: int,
        metrics: bool = False,
        least: Mapping[str, int] | None = None,
    ) -> None:
        self.replicas, self.study, self.deliver, self.cap = replicas, study, deliver, cap
        self.least = least or {}  # steps, by the key of a trial
        self.rows = list(range(len(replicas.trials)))  # of the tables below, one for each replica still held
        self.trials = list(replicas.trials)
        self.alive = [True] * len(self.trials)
        self.seconds = [0.0] * len(self.trials)
        self.steps: list[int] = []
        self.losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # per evaluation, [trials] each
        self.metrics: dict[str, list[np.ndarray]] = {}
        self.higher: dict[str, bool] = {}  # of the metrics: whether that is better
        if metrics:
            better = replicas.sessions[0].workload.better
            self.higher = {f"{split}:{name}": way == "higher" for split in SPLITS for name, way in better.items()}
            self.metrics = {name: [] for name in self.higher}
            replicas.wanted = tuple(self.metrics)
        self.how = "stacked" if isinstance(replicas, Stack) else "loop"

    def run(self, say: Callable[[int, int, float], None]) -> None:
        """Train until no replica is left."""
        self._evaluate(0)
        while any(self.alive):
            start, step = time.perf_counter(), self.steps[-1]
            say(step, sum(self.alive), self._nearest())
            held = [row for row in self.rows if self.alive[row]]
            cap = max([self.cap, *(self.least.get(self.trials[row].key, 0) for row in held)])
            then = min(next_length(step, self.trials[0].schedule), cap)
            before = state() if self.how == "stacked" and step == 0 else None
            with self._told_apart():
                self.replicas.advance(then - step)
            if before is not None:
                self._look_for_changes(before)
            self._evaluate(then)
            for row in held:
                self.seconds[row] += (time.perf_counter() - start) / len(held)
            self._shrink()

    def _look_for_changes(self, before: State) -> None:
        """Refuse what the workload has changed for everybody in this process; a stack calls its loss directly."""
        if (what := changes(before, free=("seed of torch's generator",))) is not None:
            raise WorkloadError(
                f"workload {self.replicas.sessions[0].workload.name!r} changes {what} in the middle of a run. Do it at "
                "the top of the file or in the constructor."
            )

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Raise what a stack fails with as a `_StackError`, but for errors that say already what is wrong."""
        try:
            yield
        except Exception as error:
            if self.how == "loop" or isinstance(error, PybatchError):
                raise
            if is_out_of_memory(error):
                if len(self.rows) == 1:
                    raise
                raise StackTooLargeError(str(error)) from error
            line = next(iter(str(error).strip().splitlines()), "")
            raise _StackError(f"at step {self.replicas.done} {type(error).__name__}: {line}") from error

    def _nearest(self) -> float:
        """The lowest loss of now, of the first split with a target."""
        split = next((split for split in SPLITS if split in self.study.targets), SPLITS[0])
        return float(np.nanmin(self.losses[SPLITS.index(split)][-1], initial=np.inf))

    def _evaluate(self, step: int) -> None:
        self.steps.append(step)
        with self._told_apart():
            evaluated = self.replicas.evaluate()
        measured = [self.replicas.measured[name] for name in self.metrics] if self.metrics else []
        for column, found in zip((*self.losses, *self.metrics.values()), (*evaluated, *measured), strict=True):
            values = np.full(len(self.trials), np.nan, dtype=np.float32)
            values[self.rows] = found
            column.append(values)
        steps, i = np.asarray(self.steps, dtype=np.int32), len(self.steps) - 1
        live = [row for row in self.rows if self.alive[row]]
        for split, losses in zip(SPLITS, self.losses, strict=True):
            self._look(steps, i, live, split, losses)
        for name, figures in self.metrics.items():
            self._look(steps, i, live, name, figures, -1.0 if self.higher[name] else 1.0)
        ends = [(row, end) for row in live if (end := self._end(row, step)) is not None]
        for row, end in sorted(ends, key=lambda item: item[1] != "met"):  # first those that set the limit for the rest
            self.alive[row] = False
            self.deliver(self._outcome(row, end))

    def _look(
        self, steps: np.ndarray, i: int, live: list[int], split: str, losses: list[np.ndarray], sign: float = 1.0
    ) -> None:
        """Record which of these rows have reached the split's target."""
        target = self.study.targets.get(split)
        if target is None:
            return
        tail = max(0, i - 40)  # more evaluations than the smoothing window and the one before it ever hold
        steps, goal = steps[tail:], signed(target, sign)
        table = sign * np.asarray(losses[tail:], dtype=np.float32)[:, live]
        near = smoothed(steps, table, i - tail) <= goal + 1e-9 * abs(goal)  # but for the order in which it sums
        for column in np.flatnonzero(near):
            trial = self.trials[live[column]]
            if trial.seed in self.study.found.get(split, {}).get(trial.lr, {}):
                continue
            crossing = crossing_at(steps, np.ascontiguousarray(table[:, column]), i - tail, goal)
            if crossing is not None:
                self.study.record(split, trial.lr, trial.seed, crossing)

    def _end(self, row: int, step: int) -> End | None:
        trial, train = self.trials[row], self.losses[0]
        broken = diverged(step, float(train[-1][row]), float(train[0][row]), trial.scaled.warmup_steps)
        if step < self.least.get(trial.key, 0) and not broken:
            return None
        if self.study.met(trial.lr, trial.seed):
            return "met"
        if broken:
            return "diverged"
        return "capped" if self.study.over(trial.lr, trial.seed, step) else None

    def _outcome(self, row: int, end: End) -> Outcome:
        train, test = (np.asarray([v[row] for v in losses], dtype=np.float32) for losses in self.losses)
        metrics = {
            name: Metric(np.asarray([v[row] for v in values], dtype=np.float32), self.higher[name])
            for name, values in self.metrics.items()
        }
        trajectory = Trajectory(np.asarray(self.steps, dtype=np.int32), train, test, metrics)
        return Outcome(self.trials[row], end, trajectory, self.seconds[row], self.how)

    def _shrink(self) -> None:
        """Drop finished replicas: at once from a loop, and from a stack when they are half of it."""
        left = [i for i, row in enumerate(self.rows) if self.alive[row]]
        if not left or len(left) == len(self.rows):
            return
        if self.how == "loop" or 2 * len(left) <= len(self.rows):
            self.replicas.keep(left)
            self.rows = [self.rows[i] for i in left]


def initial_losses(
    workload: Workload, trial: Trial, device: torch.device, metrics: Sequence[str] = ()
) -> dict[str, float]:
    """Losses, and these metrics, before the first step.

    Raises:
        WorkloadError: the training loss is not finite: every trial would count as diverged.
    """
    start = Loop(workload, [trial], device)
    start.wanted = tuple(metrics)
    train, test = start.evaluate()
    start.sessions[0].check_finite(torch.tensor(train[0]), "on the training split before the first step")
    return {"train": train[0], "test": test[0]} | {name: values[0] for name, values in start.measured.items()}
