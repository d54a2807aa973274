"""The input pipeline: what a workload's DataLoader gives, alone and with the training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pybatch.answer.input import kept_batch
from pybatch.base.errors import WorkloadError
from pybatch.capacity.step import TrainingStep
from pybatch.records import BatchPoint, InputPipeline, InputRate, Note
from pybatch.workloads.running.session import Session

FURTHER = 8  # times the reference batch: the second batch size that is looked at
_LEAST = 3  # batches that a rate is taken from
_ONE = 0.25  # of the time, for one worker alone; the rest in even shares


def measure_input(
    session: Session, step: TrainingStep, points: Sequence[BatchPoint], seconds: float
) -> InputPipeline | Note:
    """Rates of the workload's loader; or a note that says why there are none.

    A loader with worker processes loads ahead while a step runs; their start, and what they had ready before, are not
    counted. Each batch size gets an even share of the seconds, and `_LEAST` batches if these take longer.

    Args:
        session: of the workload, whose `loader` is asked.
        step: the training step, for the rate with it.
        points: batch sizes that were timed.
        seconds: for everything, about.
    """
    timed = [p for p in points if p.status == "ok" and p.samples_per_s]
    if not timed:
        return Note("capacity.input", "not measured: no batch size was timed")
    end = time.perf_counter() + seconds
    reference = session.workload.reference_batch
    first = min(timed, key=lambda p: (abs(p.batch - reference), p.batch)).batch
    more = [p.batch for p in timed if first < p.batch <= FURTHER * first][-1:]
    try:
        one, workers = _alone(session, first, 0, _ONE * seconds)
        rates: list[InputRate] = []
        for i, n in enumerate([first, *more]):
            left = (end - time.perf_counter()) / (len(more) + 1 - i)
            if rates and (2 * _LEAST * n / rates[-1].samples_per_s > left):
                break
            rate, workers = _alone(session, n, None, left / 2)
            rates.append(InputRate(n, rate, 1e3 * _with_step(session, step, n, left / 2)))
    except WorkloadError as error:
        return Note("capacity.input", f"not measured: {error}")
    except Exception as error:  # a worker process passes on whatever its data set raises
        line = next(iter(str(error).strip().splitlines()), "")
        return Note("capacity.input", f"not measured: the loader fails with {type(error).__name__}: {line}")
    per_worker = max(rate.samples_per_s for rate in rates) / workers if workers else one
    found = InputPipeline(workers, per_worker, tuple(rates))
    return InputPipeline(workers, per_worker, tuple(rates), kept_batch(found, timed))


def _alone(session: Session, n: int, workers: int | None, seconds: float) -> tuple[float, int]:
    """Examples/s of a loader that nobody waits for, and its workers."""
    with _batches(session, n, workers) as (batches, own):
        return n / float(np.mean(_times(batches, lambda batch: None, 2 * own, seconds))), own


def _with_step(session: Session, step: TrainingStep, n: int, seconds: float) -> float:
    """Seconds of a training step and all waiting for its batch."""

    def train(batch: Any) -> None:
        step.optimizer.zero_grad(set_to_none=True)
        session.backward(session.moved(batch))
        session.update(step.optimizer)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)

    step.clear()
    try:
        with _batches(session, n, None) as (batches, own):
            return float(np.median(_times(batches, train, 2 * own, seconds)))
    finally:
        step.clear()


@contextmanager
def _batches(session: Session, n: int, workers: int | None) -> Iterator[tuple[Iterator[Any], int]]:
    """A loader's batches; its worker processes end with the context."""
    loader = session.loader(n, workers)
    batches = iter(loader)
    try:
        yield batches, int(loader.num_workers)
    finally:
        shut = getattr(batches, "_shutdown_workers", None)
        del batches
        if shut is not None:
            shut()


def _times(batches: Iterator[Any], work: Callable[[Any], None], ready: int, seconds: float) -> list[float]:
    """Seconds from one batch to the next, once the `ready` that were loaded ahead have been used up."""
    end = time.perf_counter() + seconds
    found: list[float] = []
    for batch in itertools.islice(batches, 1 + ready):
        work(batch)
    before = time.perf_counter()
    for batch in batches:
        work(batch)
        now = time.perf_counter()
        found.append(now - before)
        before = now
        if len(found) >= _LEAST and now >= end:
            return found
    raise WorkloadError(f"its loader ended after {1 + ready + len(found)} batches: it must go on without an end")
