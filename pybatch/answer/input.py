"""Whether a training waits for its data, which no batch size helps: said before all else.

Of a training that was watched that is seen; of a workload that was measured it follows from the rates of its loader and
of its step: beside each other where worker processes load ahead, one after the other where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pybatch.base.numerals import count, counted, number, rounded, share
from pybatch.records import BatchPoint, Capacity, InputPipeline, Inputs, Reason, Training, Verdict

# Share of the time, from which on data comes before the batch size; of all that a script does between steps, where no
# DataLoader tells what of it is waiting for data.
WAITS, WAITS_OR_WORKS = 0.10, 0.25
_TELLS = 0.2  # of the time: from here on what waiting leaves to gain is worth a sentence
MOSTLY = 0.5  # of the time: from here on data is the limit, where nothing is loaded beside the steps
LEAST_MS = 1.0  # between steps, where no DataLoader is: less goes on calls of Python


def with_input(verdict: Verdict, training: Training | None, cores: int | None = None) -> Verdict:
    """The verdict on a training that was watched.

    Args:
        verdict: on its noise and its device.
        training: where the time of its steps goes.
        cores: of the machine, for workers.
    """
    if training is None or training.waiting is None:
        return verdict
    if training.workers is not None:
        waits = training.waiting >= WAITS
    else:
        waits = training.waiting >= WAITS_OR_WORKS and training.waiting * (training.step_ms or 0.0) >= LEAST_MS
    if not waits:
        return verdict
    whom = "for data" if training.workers is not None else "for data, or for what else the script does between steps,"
    sentence = f"The device waits {whom} {share(training.waiting)} of the time: {_remedy(training, cores)}"
    inputs: Inputs = {
        "waiting": training.waiting,
        "workers": None if training.workers is None else float(training.workers),
        "workers_needed": None if training.workers_needed is None else float(training.workers_needed),
    }
    return _limited(verdict, sentence, training.waiting, training.workers, inputs)


def with_loader(verdict: Verdict, capacity: Capacity | None) -> Verdict:
    """The verdict on a workload whose loader was measured: whether at the best batch the device waits for it."""
    pipeline = capacity.input if capacity is not None else None
    if capacity is None or pipeline is None or verdict.best_batch is None:
        return verdict
    timed = [p for p in capacity.batches if p.status == "ok" and p.samples_per_s]
    if not timed:
        return verdict
    best = verdict.best_batch
    near = min(timed, key=lambda p: (abs(math.log(p.batch / best)), p.batch))
    waits = waiting(pipeline, near)
    if waits < WAITS:
        return verdict
    needed, cores = workers_needed(pipeline, near), capacity.device.cores if capacity.device is not None else None
    cores = cores if capacity.device is not None and capacity.device.kind == "cpu" else None
    sentence = f"At batch {count(near.batch)} the device waits for data {share(waits)} of the time: "
    sentence += _workers(needed, pipeline.workers, cores)
    if pipeline.kept_batch is not None:
        sentence += f". Up to batch {count(pipeline.kept_batch)} it keeps up as it is"
    kept = None if pipeline.kept_batch is None else float(pipeline.kept_batch)
    inputs: Inputs = {"waiting": waits, "workers": float(pipeline.workers), "workers_needed": float(needed)}
    return _limited(
        verdict, sentence, waits, pipeline.workers, inputs | {"batch": float(near.batch), "kept_batch": kept}
    )


def waiting(pipeline: InputPipeline, point: BatchPoint) -> float:
    """Share of the time in which the device waits for data at a batch size that was timed, 0..1."""
    step = point.samples_per_s or 0.0
    own = next((rate for rate in pipeline.rates if rate.batch == point.batch), None)
    if own is not None and own.with_step_ms is not None and point.step_ms is not None:
        return max(0.0, 1 - point.step_ms / own.with_step_ms)
    loaded = rate_at(pipeline, point.batch)
    return max(0.0, 1 - loaded / step) if pipeline.workers else step / (loaded + step)


def rate_at(pipeline: InputPipeline, batch: int) -> float:
    """Examples/s of the loader alone at a batch size: as at the nearest measured, since it loads one by one."""
    return min(pipeline.rates, key=lambda rate: abs(math.log(rate.batch / batch))).samples_per_s


def workers_needed(pipeline: InputPipeline, point: BatchPoint) -> int:
    """Processes that load as fast as the device steps at this batch size."""
    return max(1, math.ceil((point.samples_per_s or 0.0) / pipeline.one_worker_per_s))


def kept_batch(pipeline: InputPipeline, timed: Sequence[BatchPoint]) -> int | None:
    """The largest batch size timed up to which the loader keeps up with the device; None where with none."""
    kept = None
    for point in sorted(timed, key=lambda p: p.batch):
        if waiting(pipeline, point) >= WAITS:
            break
        kept = point.batch
    return kept


def with_input_bounds(points: Sequence[BatchPoint], pipeline: InputPipeline | None) -> list[BatchPoint]:
    """The points, with `bound_by` "input" where the device waits for data; `bound_why` has what else was found."""
    if pipeline is None:
        return list(points)
    found = []
    for point in points:
        if point.status == "ok" and point.samples_per_s and (waits := waiting(pipeline, point)) >= WAITS:
            needed = counted(workers_needed(pipeline, point), "worker")
            text = (
                f"the device waits for data {share(waits)} of the time: the loader gives "
                f"{rounded(rate_at(pipeline, point.batch))}/s with {counted(pipeline.workers, 'worker')}, steps take "
                f"{rounded(point.samples_per_s)}/s; {needed} would do{_kept(pipeline)}"
            )
            before = "" if point.bound_by == "input" or point.bound_why is None else f". The step: {point.bound_why}"
            point = replace(point, bound_by="input", bound_why=text + before)
        found.append(point)
    return found


def _limited(verdict: Verdict, sentence: str, waits: float, workers: int | None, inputs: Inputs) -> Verdict:
    """The verdict with waiting for data said before all else but the batch, and as its limit where it is.

    Workers load beside the steps: where the device waits for them, theirs is the rate. Without any the two take turns,
    and an example takes as long to load in a larger batch: what that may gain is what the rest of the time is.
    """
    ahead, inputs = "A larger batch helps nothing before that. ", dict(inputs)
    if not workers:
        inputs["gain_at_most"] = 1 / waits
        most = f"Before that a larger batch gains {number(1 / waits, 2)} times the rate at most. "
        ahead = most if waits >= _TELLS else ""  # of less, the device's own ceiling is the nearer limit
    because = f"{sentence}. {ahead}{verdict.because}".strip()
    rest = verdict.text.removeprefix(verdict.answer).strip().removeprefix(verdict.because).strip()
    text = " ".join(part for part in (verdict.answer, because, rest) if part)
    if not workers and waits < MOSTLY:
        reasons = (*verdict.reasons, Reason("input", sentence, "measured", inputs))
        return replace(verdict, because=because, text=text, reasons=reasons)
    others = (r for r in verdict.reasons if r.figure != "limit")
    reasons = (*others, Reason("limit", sentence, "measured", inputs))
    return replace(verdict, limit="input", because=because, text=text, reasons=reasons)


def _kept(pipeline: InputPipeline) -> str:
    if pipeline.kept_batch is None:
        return ""
    return f", and up to batch {count(pipeline.kept_batch)} it keeps up as it is"


def _remedy(training: Training, cores: int | None) -> str:
    needed, now = training.workers_needed, training.workers
    if needed is None:
        return "load batches ahead, in a DataLoader with workers"
    return _workers(needed, now, cores)


def _workers(needed: int, now: int | None, cores: int | None) -> str:
    have = "it has none" if not now else f"it has {now}"
    scarce = f", and there are {counted(cores, 'core')}: make examples cheaper" if cores and needed > cores else ""
    return f"{counted(needed, 'worker')} would do ({have}){scarce}"
