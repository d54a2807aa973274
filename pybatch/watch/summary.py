"""What was observed, as records."""

from __future__ import annotations

import math
import resource
from typing import Any

import numpy as np
import torch

from pybatch.capacity.stopping import median
from pybatch.device.counters import Region
from pybatch.device.identity import DTYPES, describe
from pybatch.device.memory import process_bytes
from pybatch.records import BatchPoint, Capacity, Note, Training, WorkloadInfo
from pybatch.watch.finding import plain_name
from pybatch.watch.observer import Observer, Subject
from pybatch.watch.steps import PARTS, Step

_NAMES = {torch.float16: "fp16", torch.float64: "fp64"} | {dtype: name for name, dtype in DTYPES.items()}
_LEAST = 3  # steps of which shares are told


class Meter:
    """Counters of the device and memory of the process, over the steps that are watched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._region: Region | None = None
        self.cpu_active: float | None = None
        self.joules: float | None = None
        self.memory_bytes: int | None = None
        if device.type == "cpu":  # a GPU's counters are read in the replays: some take the profiler to themselves
            self._region = Region(device)
            self._region.start()

    def stop(self) -> None:
        """End the region."""
        if self._device.type == "cuda":
            self.memory_bytes = int(torch.cuda.max_memory_reserved(self._device))
        else:
            self.memory_bytes = process_bytes("VmHWM")
        if self._region is not None:
            reading = self._region.stop()
            self.cpu_active, self.joules = reading.cpu_active, reading.joules
            self._region = None


def child_seconds() -> float:
    """Seconds of processors that child processes of this one took, of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def info(name: str, subject: Subject, observer: Observer) -> WorkloadInfo:
    """The training as a record's workload."""
    model, optimizer = subject.model, subject.optimizer
    group = optimizer.param_groups[0]
    # A schedule is known by its height: it may have come to 0, or not yet be past its warm-up.
    rates = [value for value in (group.get("initial_lr"), group.get("lr"), subject.rate) if value is not None]
    rate = max(map(float, rates), default=0.0)
    first = group["params"][0]
    dtype = observer.autocast.get(subject.device.type, first.dtype)
    return WorkloadInfo(
        name=name,
        unit="examples",
        parameters=subject.trained.parameters,
        dtype=_NAMES.get(dtype, str(dtype).removeprefix("torch.")),
        model=plain_name(model) if model is not None else None,
        learning_rate=rate if rate > 0 else None,
        reference_batch=_batch(observer),
        optimizer=type(optimizer).__name__.lower() if observer.hand is not optimizer else None,
    )


def _batch(observer: Observer) -> int | None:
    steps = observer.steps
    if steps is None or not steps.micro_batch or not steps.accumulation:
        return None
    return steps.micro_batch * steps.accumulation * (observer.subject.world if observer.subject is not None else 1)


def training(name: str, subject: Subject, observer: Observer, meter: Meter | None) -> Training:
    """The steps so far."""
    steps, notes = observer.steps, []
    assert steps is not None  # there is a subject
    usual = steps.usual
    found = list(subject.marks)
    if subject.scaler is not None:
        found.append("GradScaler")
    if subject.clipped:
        found.append("gradient clipping")
    found += [f"autocast {_NAMES.get(dtype, dtype)}" for dtype in observer.autocast.values()]
    if subject.closures:
        found.append("step(closure)")
    batch, milliseconds = _batch(observer), None
    middle = median([step.seconds for step in usual]) if usual else None
    if middle is not None:
        milliseconds = 1e3 * middle.value
    elif steps.count:
        notes.append(Note("training.step_ms", "no step of the usual size was timed after the first ones"))
    shares = _shares(usual, observer.workers, len(observer.optimizers)) if len(usual) >= _LEAST else {}
    uneven = len(steps.sizes) > 1
    if uneven and steps.micro_batch is not None:
        other = sum(steps.sizes.values()) - steps.sizes[steps.micro_batch]
        notes.append(Note("training.batch", f"{other} of {sum(steps.sizes.values())} passes had another size"))
    if len(stepped := observer.optimizers) > 1 and subject.optimizer in stepped:
        at = next(i for i, one in enumerate(stepped) if one is subject.optimizer)
        text = f"number {at} of the {len(stepped)} that stepped, from 0 on; --optimizer-index takes another"
        notes.append(Note("training.optimizer", text))
    joules = None
    if meter is not None and meter.joules is not None and batch:
        joules = meter.joules / (batch * max(1, steps.count))
    return Training(
        name=name,
        model=plain_name(subject.model) if subject.model is not None else "not seen",
        optimizer=type(subject.optimizer).__name__ if observer.hand is not subject.optimizer else "by hand",
        wrapped=tuple(found),
        batch=batch,
        micro_batch=steps.micro_batch or None,
        accumulation=steps.accumulation or None,
        devices=subject.world,
        steps=steps.count,
        step_ms=milliseconds,
        step_ms_low=1e3 * middle.low if middle is not None and middle.low is not None else None,
        step_ms_high=1e3 * middle.high if middle is not None and middle.high is not None else None,
        samples_per_s=1e3 * batch / milliseconds if batch and milliseconds else None,
        workers=observer.workers,
        cpu_active=meter.cpu_active if meter is not None else None,
        joules_per_sample=joules,
        memory_bytes=meter.memory_bytes if meter is not None else None,
        notes=tuple(notes),
        **shares,
    )


def _shares(usual: list[Step], workers: int | None, optimizers: int) -> dict[str, Any]:
    """Where the time goes, as shares of it; by means, as few long waits take as much as many short ones."""
    whole = sum(step.seconds for step in usual)
    parts = dict(zip(PARTS, (float(x) for x in np.array([s.parts for s in usual]).sum(0) / whole), strict=True))
    if workers is None and optimizers > 1:  # what others are trained in between is no waiting
        return parts | {"waiting": None, "script": parts["waiting"]}
    if workers is None:
        return parts | {"input_from": "between a step, or a pass, and the next forward pass"}
    loading = min(parts["waiting"], sum(step.loading for step in usual) / whole)
    own = whole / len(usual) * (1.0 - loading)  # seconds of a step without waiting
    made = loading * whole / len(usual) if workers == 0 else workers * whole / len(usual)  # of a batch, by one worker
    needed = max(1, math.ceil(made / own)) if own > 0 and loading > 0 else workers
    return parts | {
        "waiting": loading,
        "script": max(0.0, parts["waiting"] - loading),
        "workers_needed": max(needed, workers),
        "input_from": "DataLoader",
    }


def own_batch(training: Training, work: WorkloadInfo, device: torch.device, reason: str | None) -> Capacity:
    """Throughput at the training's own batch alone, of its steps but for waiting; and why there is no more."""
    batch, points = training.batch, []
    notes = [] if reason is None else [Note("batches", f"throughput at the script's own batch alone: {reason}")]
    if batch and training.step_ms is not None:
        idle = (training.waiting or 0.0) + (training.script or 0.0)
        spent = 1.0 - (idle if training.workers is not None else 0.0)
        points.append(
            BatchPoint(
                batch=batch,
                status="ok",
                step_ms=training.step_ms * spent,
                samples_per_s=1e3 * batch / (training.step_ms * spent),
                samples=training.steps,
            )
        )
    notes.append(Note("capacity.model", f"{len(points)} batch size timed; a fit needs 3"))
    return Capacity(
        t0_ms=None,
        ceiling_samples_per_s=None,
        half_batch=None,
        saturation_batch=None,
        saturation_low=None,
        saturation_high=None,
        saturation_measured=None,
        max_batch=None,
        max_batch_verified=None,
        model=None,
        complete=False,
        notes=tuple(notes),
        device=describe(device),
        workload=work,
        batches=tuple(points),
    )
