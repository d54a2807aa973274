"""What was looked at and timed, as records: points, fit, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pybatch.answer.input import with_input_bounds
from pybatch.answer.limit import FALL, before_fall, fastest
from pybatch.base.numerals import counted, share
from pybatch.capacity.bound import OVER, Place, undecided, with_bounds
from pybatch.capacity.burst import BURST_STEPS
from pybatch.capacity.energy import WINDOW_S
from pybatch.capacity.exploration import OUT_OF_TIME, Explorer, Look
from pybatch.capacity.largest import Largest
from pybatch.capacity.timing import Series, quantiles_ms
from pybatch.device import counters
from pybatch.fits.throughput import fit_throughput
from pybatch.records import (
    Anchor,
    BatchPoint,
    Capacity,
    Ceilings,
    Device,
    InputPipeline,
    Note,
    StepMode,
    ThroughputFit,
    WorkloadInfo,
)
from pybatch.records.capacity import SATURATED

_AVERAGED = ("sm_active", "sm_occupancy", "tensor_active", "dram_active", "cpu_active", "sm_clock_mhz")
_NEARLY = 0.90  # the same for its median
_DRIFT = 0.05  # change of the anchor's step time that a reader should hear of
_SPREAD = 0.15  # of a step time's medians in different rounds
_SUSTAINED = 0.05  # slowdown from burst to sustained, likewise
_FITTABLE = 3  # batch sizes


def point(
    look: Look | None,
    n: int,
    series: Series | None,
    ceilings: Ceilings | None,
    untimed: str = OUT_OF_TIME,
    *,
    burst_s: float | None = None,
    compile_s: float | None = None,
) -> BatchPoint:
    """The record of one batch size; what bounds it is left to `summarize`, which knows the fit."""
    if look is None:
        return BatchPoint(n, "skipped", reason=untimed)
    if look.status != "ok":
        return BatchPoint(n, look.status, reason=look.reason)
    if series is not None and series.failure is not None:
        status, reason = series.failure
        return BatchPoint(n, status, reason=reason)
    if series is None or not series.seconds:
        return BatchPoint(
            n,
            "skipped",
            model_flops=look.flops,
            step_bytes=look.moved_bytes,
            memory_bytes=look.memory_bytes,
            compile_s=compile_s,
            reason=untimed,
        )
    middle = series.median
    rate = look.flops / middle.value if look.flops is not None else None
    gemm = ceilings.gemm_flops if ceilings is not None else None
    peak = ceilings.datasheet_flops if ceilings is not None else None
    energy = series.energy
    throttled, capped = (counters.mean(series.readings, figure) for figure in ("throttled", "power_capped"))
    copy, eager = ceilings.copy_bytes_per_s if ceilings is not None else None, series.eager_s
    moved = look.moved_bytes / middle.value if look.moved_bytes is not None else None
    read: dict[str, Any] = {figure: counters.mean(series.readings, figure) for figure in _AVERAGED}
    return BatchPoint(
        batch=n,
        status="ok",
        step_ms=middle.value * 1e3,
        step_ms_low=None if middle.low is None else middle.low * 1e3,
        step_ms_high=None if middle.high is None else middle.high * 1e3,
        samples_per_s=n / middle.value,
        host_bound=series.host_bound,
        model_flops=look.flops,
        mfu_measured=rate / gemm if rate is not None and gemm else None,
        mfu_datasheet=rate / peak if rate is not None and peak else None,
        memory_bytes=look.memory_bytes,
        joules_per_sample=None if energy is None else energy.per_step / n,
        energy_window_s=None if energy is None else energy.seconds,
        throttled=None if throttled is None else throttled > 0,
        power_capped=None if capped is None else capped > 0,
        throttled_share=throttled,
        power_capped_share=capped,
        samples=len(series.seconds),
        burst_step_ms=None if burst_s is None else burst_s * 1e3,
        eager_step_ms=None if eager is None else eager * 1e3,
        launch_overhead_ms=None if eager is None else (eager - middle.value) * 1e3,
        compile_s=compile_s,
        step_bytes=look.moved_bytes,
        mbu_measured=moved / copy if moved is not None and copy else None,
        blocks_ms=tuple(float(f"{1e3 * block:.6g}") for block in series.blocks),
        block_rounds=tuple(series.block_rounds),
        steady=series.stopped is not None,
        step_ms_quantiles=quantiles_ms(series.seconds),
        **read,
    )


def refused(points: Sequence[BatchPoint], for_time: set[int], given: bool) -> list[int]:
    """Batch sizes that the workload refuses, so that what was asked for is not complete.

    `for_time` are those skipped for want of time. Of batch sizes that were not given but tried, those below all that
    run do not count: a model with batch normalization has a smallest batch.
    """
    least = min((p.batch for p in points if p.status == "ok"), default=0)
    failed = [p.batch for p in points if p.status == "skipped" and p.batch not in for_time]
    return [n for n in failed if given or n > least]


def summarize(
    points: Sequence[BatchPoint],
    samples: dict[int, list[float]],
    notes: list[Note],
    *,
    device: Device,
    ceilings: Ceilings | None,
    workload: WorkloadInfo,
    largest: Largest,
    drift: float | None,
    disturbed: tuple[str, ...],
    complete: bool,
    seed: int,
    place: Place,
    mode: StepMode = "eager",
    anchor: Anchor | None = None,
    pipeline: InputPipeline | None = None,
) -> Capacity:
    """The capacity record: the fit over what was timed, and what a reader must know of it."""
    timed = [p for p in points if p.status == "ok"]
    fit = None
    if len(timed) < _FITTABLE:
        notes.append(Note("capacity.model", f"{counted(len(timed), 'batch size')} timed; a fit needs {_FITTABLE}"))
    else:
        rising = before_fall(timed)
        rising = rising if len(rising) >= _FITTABLE else timed  # no model of `fit_throughput` can fall
        rounds = [p.block_rounds for p in rising]
        known = all(len(entry) == len(samples[p.batch]) for entry, p in zip(rounds, rising, strict=True))
        fit = fit_throughput(
            [p.batch for p in rising],
            [samples[p.batch] for p in rising],
            seed=seed,
            rounds=rounds if known else None,
        )
        notes += _fit_notes(fit, timed, largest)
        if len(rising) < len(timed):
            text = f"throughput falls by over {FALL:.0%} past batch {rising[-1].batch}; the fit is of those up to it"
            notes.append(Note("capacity.model", text))
    disturbed = (*disturbed, *_unsteady(timed, drift))
    if disturbed:
        text = f"{'; '.join(disturbed)}: times are those of a disturbed machine"
        notes.append(Note("batches.step_ms", text))
    points = with_input_bounds(with_bounds(points, place, fit), pipeline)
    if any(p.status == "ok" and p.bound_by is None for p in points):
        notes.append(Note("batches.bound_by", undecided(points)))
    notes += _above_roof(timed, place)
    notes += _burst_notes(timed)
    if workload.examples is not None and timed and timed[-1].batch > workload.examples:
        text = (
            f"a batch above the {workload.examples:,} training examples repeats some of them, as {workload.name} draws "
            "with replacement; its speed is real, but it holds no more information than the whole set"
        )
        notes.append(Note("batches.batch", text))
    apart = "" if pipeline is None else "; its rate beside it tells where the device would wait"
    notes.append(Note("batches.step_ms", f"batch drawn beforehand: the input pipeline is not in the step{apart}"))
    return Capacity(
        t0_ms=fit.t0_s * 1e3 if fit else None,
        ceiling_samples_per_s=fit.ceiling if fit else None,
        half_batch=fit.half_batch if fit else None,
        saturation_batch=fit.saturation_batch if fit else None,
        saturation_low=fit.saturation_low if fit else None,
        saturation_high=fit.saturation_high if fit else None,
        saturation_measured=_saturation_measured(fit, timed),
        max_batch=largest.batch,
        max_batch_verified=largest.verified,
        model=fit,
        drift=drift,
        anchor=anchor,
        complete=complete,
        disturbed=disturbed,
        input=pipeline,
        mode=mode,
        notes=tuple(notes),
        device=device,
        ceilings=ceilings,
        workload=workload,
        batches=tuple(points),
    )


def counter_notes(
    region: counters.Region, points: Sequence[BatchPoint], ceilings: Ceilings | None, explorer: Explorer
) -> list[Note]:
    """A reason for every figure that is null in some of the timed points."""
    device, reasons = region.device, dict(region.reasons)
    reasons.setdefault(
        "joules_per_sample",
        f"the time budget had no room for a window of {WINDOW_S:g} s at these batch sizes, or the run was cut before "
        "it; shorter ones say little, as the counter lags",
    )
    for figure in counters.GPU_FIGURES:
        reasons.setdefault(figure, "the steady region of these batches was too short for the counter")
    reasons["throttled_share"], reasons["power_capped_share"] = reasons["throttled"], reasons["power_capped"]
    reasons["energy_window_s"] = reasons["joules_per_sample"]
    if device.type == "cpu":
        reasons["host_bound"] = "on a CPU the host is the device"
        reasons["mfu_datasheet"] = "no datasheet peak is quoted for CPUs"
    else:
        reasons["mfu_datasheet"] = "this device is not in the table of datasheet peaks, or TF32 is on"
    reasons["burst_step_ms"] = "the time for rests went to the middle and the largest batch sizes first"
    reasons["eager_step_ms"] = reasons["launch_overhead_ms"] = "no CUDA graphs were asked for (--cuda-graph)"
    reasons["compile_s"] = "the steps were not compiled (--compile)"
    reasons["step_bytes"] = reasons["mbu_measured"] = "a compiler fuses operators: what they move is not known"
    if not explorer.step.compiled:
        reasons["mbu_measured"] = "no copy large enough to measure a ceiling fits in memory"
    if explorer.memory.reason is not None:
        reasons["memory_bytes"] = explorer.memory.reason
    if explorer.flops_reason is not None:
        reasons["model_flops"] = reasons["mfu_measured"] = explorer.flops_reason
        if ceilings is not None and ceilings.datasheet_flops is not None:
            reasons["mfu_datasheet"] = explorer.flops_reason
    timed = [p for p in points if p.status == "ok"]
    notes = [
        Note(f"batches.{figure}", reason)
        for figure, reason in sorted(reasons.items())
        if any(getattr(p, figure) is None for p in timed)
    ]
    notes += [
        Note(f"batches.{figure}", origin)
        for figure, origin in region.origins.items()
        if any(getattr(p, figure) is not None for p in timed)
    ]
    impossible = [p for p in timed if p.tensor_active is not None and (p.mfu_datasheet or 0) > 1.1 * p.tensor_active]
    if impossible:
        text = "more model FLOPs than the tensor cores were active for: a count is wrong, or other units did the work"
        notes.append(Note("batches.mfu_datasheet", text))
    if any(p.step_ms_low is None for p in timed):
        notes.append(Note("batches.step_ms_low", "no interval of a median from fewer than 6 steps"))
    if ceilings is not None and ceilings.datasheet_flops is None:
        notes.append(Note("ceilings.datasheet_flops", reasons["mfu_datasheet"]))
    return notes


def _above_roof(timed: Sequence[BatchPoint], place: Place) -> list[Note]:
    """On model FLOPs beyond those of the measured matrix product."""
    most = max((p.mfu_measured for p in timed if p.mfu_measured is not None), default=0.0)
    if most <= 1:
        return []
    if most <= OVER:
        text = "above 1: the matrix product that gave the ceiling was itself disturbed, or smaller ones run faster"
        return [Note("batches.mfu_measured", text)]
    text = (
        f"steps run at up to {share(most)} of the measured {place.dtype} matrix product: that was disturbed, or is "
        "slower on this device than what the steps run, so it bounds nothing here"
    )
    slow = place.kind == "cpu" and place.dtype != "fp32"
    return [Note("capacity", f"{text}. Time steps in fp32 as well" if slow else text)]


def _unsteady(timed: Sequence[BatchPoint], drift: float | None) -> list[str]:
    """What the times themselves show of a disturbance: from round to round, and from the beginning to the end."""
    found = []
    if drift is not None and abs(drift) > _DRIFT:
        found.append(f"one batch's step time changed by {drift:+.1%} during the run")
    spreads = [spread for p in timed if (spread := _between_rounds(p)) is not None]
    middle = float(np.median(spreads)) if spreads else 0.0
    if middle > _SPREAD:
        found.append(f"step times differ by {middle:.0%} from one round to another")
    return found


def _between_rounds(p: BatchPoint) -> float | None:
    """The largest median of a round over the smallest, minus 1; None of a single round."""
    rounds = {r: [b for b, of in zip(p.blocks_ms, p.block_rounds, strict=True) if of == r] for r in set(p.block_rounds)}
    medians = [float(np.median(blocks)) for blocks in rounds.values()]
    return max(medians) / min(medians) - 1 if len(medians) > 1 else None


def _burst_notes(timed: Sequence[BatchPoint]) -> list[Note]:
    slower = [(p.step_ms_low / p.burst_step_ms - 1, p.batch) for p in timed if p.step_ms_low and p.burst_step_ms]
    most, batch = max(slower, default=(0.0, 0))
    if most <= _SUSTAINED:
        return []
    text = (
        f"sustained steps of batch {batch} take at least {most:.0%} longer than its first {BURST_STEPS} after a rest; "
        "the fit is of sustained ones"
    )
    return [Note("batches.step_ms", text)]


def _saturation_measured(fit: ThroughputFit | None, timed: Sequence[BatchPoint]) -> int | None:
    """Smallest measured batch whose throughput interval reaches 95 % of the fitted ceiling, its median 90 %.

    The interval alone would let the noisiest batch saturate first.
    """
    if fit is None or fit.ceiling is None:
        return None
    near = (p for p in timed if fastest(p) >= SATURATED * fit.ceiling)
    return next((p.batch for p in near if (p.samples_per_s or 0.0) >= _NEARLY * fit.ceiling), None)


def _fit_notes(fit: ThroughputFit, timed: Sequence[BatchPoint], largest: Largest) -> list[Note]:
    most = timed[-1].batch
    notes = []
    if fit.wave is not None:
        text = (
            f"step time rises in steps of {fit.wave} examples: a batch just above a multiple of {fit.wave} is wasteful"
        )
        notes.append(Note("capacity.model", text))
    named = {"ceiling": "ceiling_samples_per_s"}
    told = (note for note in fit.notes if note.figure != "rms_log_error")  # of which the verdict speaks
    notes += [Note(f"capacity.{named.get(note.figure, note.figure)}", note.text) for note in told]
    if fit.saturation_batch is None:
        return notes
    if largest.batch is not None and fit.saturation_batch > largest.batch:
        text = f"not saturated: memory ends at batch {largest.batch}, below saturation"
        notes.append(Note("capacity.saturation_batch", text))
    elif fit.saturation_batch > most:
        text = f"not saturated: modelled, above the largest measured batch {most}"
        notes.append(Note("capacity.saturation_batch", text))
    if _saturation_measured(fit, timed) is None:
        notes.append(Note("capacity.saturation_measured", f"no measured batch reaches {SATURATED:.0%} of the ceiling"))
    return notes
