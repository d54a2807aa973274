"""Drives a training loop by a batch-size schedule: how many passes a step, and the optimizer's settings at each batch.

    schedule = pybatch.schedule.BatchSchedule(found, optimizer, micro_batch=32)
    while schedule.examples < total:
        for _ in range(schedule.accumulation):
            loss_of(next(batches)).backward()  # of 32 examples
        optimizer.step()
        schedule.step()

The rate is scaled within `optimizer.step()` alone, and is the script's own again after it: any learning-rate schedule
goes on as if the batch had never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import Sampler

from pybatch.answer.schedule import RATES
from pybatch.base.errors import UsageError
from pybatch.base.plain import said
from pybatch.records import NoiseScale, Run, Schedule
from pybatch.scaling import Base, followed, scale

__all__ = ["BatchSchedule", "ScheduledBatches"]

_HYSTERESIS = 1.1  # times the next doubling, that the noise scale must ask for
_SCHEMA = "pybatch-schedule/1"


class Measured(Protocol):
    """A handle of `pybatch.noise.attach`, or a fused optimizer made with noise=True."""

    @property
    def noise(self) -> NoiseScale:
        """The noise scale."""


class BatchSchedule:
    """The batch size of each step, by stages that were planned or by the noise scale as it is measured.

    Args:
        stages: a `Schedule` or the record that holds it, or pairs (examples seen, batch) that begin at 0; of a schedule
            by noise the first batch.
        optimizer: whose rate, and as asked for betas and weight decay, follow the batch; None: the caller sets them.
        base_batch: that the optimizer's settings are for; None: the schedule's.
        micro_batch: examples of a pass on one device; every batch must be a multiple of it times `devices`. None: the
            first batch over the devices.
        devices: that share the batch.
        rate: how the learning rate follows: "constant", "linear" or "sqrt" of `pybatch.scaling`; None: the
            schedule's, else "sqrt".
        beta2: "half-life" keeps that of Adam's second moment in examples (Marek et al. 2025): beta2^(B / base).
        decay: "timescale" keeps that of weight decay in examples: B / (rate x decay), see `pybatch.scaling.followed`.
        noise: what measures; the batch then doubles once `cost` times its noise scale asks for twice as many, with
            hysteresis, and never falls.
        cost: share of the noise scale that is the batch.
        every: steps between two doublings at least, and from one reading of the noise to the next.
        most: largest batch of a schedule by noise.

    Raises:
        UsageError: stages that are none, batches that do not divide, or an option that is not known.
    """

    def __init__(
        self,
        stages: Run | Schedule | Sequence[tuple[int, int]] | int,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        base_batch: int | None = None,
        micro_batch: int | None = None,
        devices: int = 1,
        rate: str | None = None,
        beta2: Literal["half-life"] | None = None,
        decay: Literal["timescale"] | None = None,
        noise: Measured | None = None,
        cost: float = 0.2,
        every: int = 100,
        most: int | None = None,
    ) -> None:
        self._stages, base, planned = _stages_of(stages)
        self._base = base if base_batch is None else base_batch
        if self._base < 1:
            raise UsageError(
                f"base_batch {base_batch}: give the batch that the optimizer's settings are for, 1 or more."
            )
        rate = rate or planned
        if rate not in RATES:
            raise UsageError(f"rate {said(rate)} is not known. Use one of: constant, linear, sqrt.")
        if beta2 not in (None, "half-life") or decay not in (None, "timescale"):
            raise UsageError(f"beta2 {said(beta2)}, decay {said(decay)}: give 'half-life' and 'timescale', or None.")
        if noise is not None and len(self._stages) > 1:
            raise UsageError("stages and noise: give the first batch alone, where the noise scale decides the others.")
        if noise is None and isinstance(stages, int):
            raise UsageError(f"one batch, {stages}, and nothing to follow: give stages, or noise= and most=.")
        if noise is not None and not hasattr(type(noise), "noise"):
            raise UsageError(
                f"noise: a {type(noise).__name__} measures none. Give a handle of pybatch.noise.attach, or an "
                "optimizer of pybatch.optim made with noise=True."
            )
        if beta2 is not None and optimizer is not None and "betas" not in optimizer.param_groups[0]:
            raise UsageError(f"beta2={beta2!r}: {type(optimizer).__name__} has no betas. Leave it out.")
        if noise is not None and most is None:
            raise UsageError("a schedule by noise needs most=, the largest batch it may take.")
        if not 0 < cost < math.inf or every < 1 or devices < 1:
            raise UsageError(f"cost {cost:g}, every {every}, devices {devices}: give numbers above 0.")
        self._rate, self._beta2, self._decay = rate, beta2, decay
        self._noise, self._cost, self._every, self._most = noise, cost, every, most
        self.devices = devices
        first = self._stages[0][1]
        self.micro_batch = micro_batch if micro_batch is not None else max(1, first // devices)
        for _, batch in self._stages:
            self._check(batch)
        self.batch = first  # examples of the step under way, over all devices
        self.steps = self.examples = 0  # taken so far
        self._changed = 0  # step of the last doubling
        self._kept: list[dict[str, Any]] = []
        self._removals = []
        if optimizer is not None:
            self._removals = [
                optimizer.register_step_pre_hook(self._scale).remove,
                optimizer.register_step_post_hook(self._put_back).remove,
            ]

    @property
    def accumulation(self) -> int:
        """Passes of the step under way, on each device."""
        return self.batch // (self.micro_batch * self.devices)

    @property
    def rate_factor(self) -> float:
        """What the learning rate is multiplied with in this step."""
        return float(self._scaled({"lr": 1.0})["lr"])

    def step(self, passes: int | None = None, ready: Callable[[int], bool] = lambda passes: True) -> int:
        """A step was taken; returns the batch of the next one.

        Args:
            passes: that it had on each device, where they were fewer than `accumulation`, as at the end of an epoch.
            ready: whether steps of so many passes can begin here; else the switch waits.
        """
        self.steps += 1
        self.examples += self.batch if passes is None else passes * self.micro_batch * self.devices
        if self._noise is None:
            self.switch(ready)
        elif self.steps - self._changed >= self._every and not self.steps % self._every:
            self._follow(self._noise)
        return self.batch

    def switch(self, ready: Callable[[int], bool] = lambda passes: True) -> None:
        """Take the batch that is due by the stages, where steps of so many passes can begin."""
        if self._noise is None:
            due = next(batch for start, batch in reversed(self._stages) if self.examples >= start)
            if due == self.batch or ready(due // (self.micro_batch * self.devices)):
                self.batch = due

    def detach(self) -> None:
        """Take the hooks off the optimizer."""
        for remove in self._removals:
            remove()
        self._removals = []

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {
            "schema": _SCHEMA,
            "batch": self.batch,
            "steps": self.steps,
            "examples": self.examples,
            "changed": self._changed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; raises UsageError where it is none, or its batch does not divide here."""
        names = ("batch", "steps", "examples", "changed")
        if state.get("schema") != _SCHEMA or any(not isinstance(state.get(name), int) for name in names):
            raise UsageError("the state of a schedule lacks its parts. Load what state_dict() of one returned.")
        if min(state[name] for name in names[1:]) < 0:
            raise UsageError("the state of a schedule counts fewer than no steps or examples. It is damaged.")
        self._check(state["batch"])
        self.batch, self.steps, self.examples, self._changed = (state[name] for name in names)

    def _check(self, batch: int) -> None:
        share = self.micro_batch * self.devices
        if share < 1 or batch < 1 or batch % share:
            raise UsageError(
                f"batch {batch} is no multiple of micro_batch {self.micro_batch} x {self.devices} devices. Give a "
                "micro_batch that divides every stage's."
            )

    def _follow(self, measured: Measured) -> None:
        """Double where the noise scale asks for it."""
        noise = measured.noise
        value = noise.b_simple if noise.status == "resolved" else noise.low
        if value is None or self._most is None or 2 * self.batch > self._most:
            return
        if self._cost * value >= _HYSTERESIS * 2 * self.batch:
            self.batch *= 2
            self._changed = self.steps

    # The optimizer's settings, within its step.

    def _scaled(self, group: dict[str, Any]) -> dict[str, Any]:
        return dict(scale(self._rate, group, self.batch, Base(self._base)).group)

    def _scale(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._put_back(optimizer)  # of a step that raised
        factor = self.rate_factor
        for group in optimizer.param_groups:
            self._kept.append({name: _copied(group[name]) for name in ("lr", "betas", "weight_decay") if name in group})
            _multiply(group, "lr", factor)
            beta2 = self._beta2 if "betas" in group else None  # groups without are left as they are
            decay = self._decay if group.get("weight_decay") else None
            found = followed(group, self.batch, self._base, beta2 or "constant", decay or "constant", rate=factor)
            if beta2 is not None:
                group["betas"] = found["betas"]
            if decay is not None:
                _multiply(group, "weight_decay", found["weight_decay"] / group["weight_decay"])

    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, kept in zip(optimizer.param_groups, self._kept, strict=False):
            for name, value in kept.items():
                if isinstance(group[name], torch.Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value
        self._kept = []


def passes_of(schedule: BatchSchedule, steps: int, epoch: int) -> tuple[int, int]:
    """The most passes of a step, and those of all steps to come, where an epoch has so many and steps end with it.

    Args:
        schedule: where it stands; it is not moved. One by noise may take its largest batch at once.
        steps: of the whole run.
        epoch: passes.
    """
    share = schedule.micro_batch * schedule.devices
    if schedule._noise is not None:
        longest = max(schedule.accumulation, (schedule._most or 0) // share)
        return longest, longest * (steps - schedule.steps)
    ahead = BatchSchedule(schedule._stages, micro_batch=schedule.micro_batch, devices=schedule.devices)
    ahead.load_state_dict(schedule.state_dict())
    longest, done, made = ahead.accumulation, 0, 0
    while ahead.steps < steps:
        taken = min(ahead.accumulation, epoch - made)
        made, done = made + taken, done + taken
        ahead.step(taken, lambda passes: made % passes == 0)  # noqa: B023
        if made == epoch:
            made = 0
            ahead.switch()
        longest = max(longest, ahead.accumulation)
        if ahead.batch == ahead._stages[-1][1] and made == 0:  # the rest is epochs alike
            whole, rest = divmod(steps - ahead.steps, -(-epoch // ahead.accumulation))
            return longest, done + whole * epoch + rest * ahead.accumulation
    return longest, done


class ScheduledBatches(Sampler[list[int]]):
    """A `batch_sampler` for a DataLoader whose batches are the schedule's: whole steps in one pass, exact in examples.

    The loader asks ahead of the training by as many batches as its workers hold; what it asks for is counted here, from
    where the schedule stands when an epoch begins, so that a switch comes at its example. A step is one batch of it:
    `BatchSchedule.accumulation` is for loops without such a loader.

    Args:
        sampler: of single indices, such as a RandomSampler; its last, partial batch is left out.
        schedule: planned, and stepped by the loop; one by noise is known too late for a loader that asks ahead.
    """

    def __init__(self, sampler: Sampler[int], schedule: BatchSchedule) -> None:
        if schedule._noise is not None:
            raise UsageError("a schedule by noise can't drive a sampler, which is asked ahead. Use accumulation.")
        self._sampler, self._schedule = sampler, schedule

    def _sizes(self) -> Iterator[int]:
        """Of the batches to come, on this device."""
        examples, stages = self._schedule.examples, self._schedule._stages
        while True:
            batch = next(batch for start, batch in reversed(stages) if examples >= start)
            examples += batch
            yield batch // self._schedule.devices

    def __iter__(self) -> Iterator[list[int]]:
        held: list[int] = []
        sizes = self._sizes()
        size = next(sizes)
        for index in self._sampler:
            held.append(index)
            if len(held) == size:
                yield held
                held, size = [], next(sizes)

    def __len__(self) -> int:
        """Batches of an epoch that begins now."""
        left, found = len(self._sampler), 0  # type: ignore[arg-type]
        for size in self._sizes():
            if size > left:
                break
            left, found = left - size, found + 1
        return found


def _stages_of(stages: Run | Schedule | Sequence[tuple[int, int]] | int) -> tuple[list[tuple[int, int]], int, str]:
    """(examples before, batch) by stage, the base batch and the rate's rule."""
    if isinstance(stages, Run):
        if stages.batch_schedule is None:
            raise UsageError("stages: this record has no schedule. Give one that 'pybatch schedule -o' wrote.")
        stages = stages.batch_schedule
    if isinstance(stages, Schedule):
        return [(stage.first_example, stage.batch) for stage in stages.stages], stages.base_batch, stages.rate_rule
    given = [(0, stages)] if isinstance(stages, int) else list(stages)
    pairs = [pair for pair in given if len(pair) == 2 and all(type(value) is int for value in pair)]
    starts = [start for start, _ in pairs]
    if not pairs or len(pairs) < len(given) or starts[0] != 0 or starts != sorted(set(starts)):
        raise UsageError(
            f"stages {said(stages)}: give pairs (examples seen, batch) from (0, B) on, rising in examples."
        )
    if min(batch for _, batch in pairs) < 1:
        raise UsageError(f"stages {said(stages)}: a batch has at least one example.")
    return pairs, pairs[0][1], "sqrt"


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _multiply(group: dict[str, Any], name: str, factor: float) -> None:
    """In place where it is a tensor, which a captured step reads."""
    if isinstance(group[name], torch.Tensor):
        group[name].mul_(factor)
    else:
        group[name] = group[name] * factor
