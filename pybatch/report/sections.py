"""A run as titled sections of rows and lines: what every format prints, said once."""

from __future__ import annotations

from dataclasses import fields

from pybatch.base import numerals as n
from pybatch.records import BatchPoint, Capacity, Ceilings, Distributed, NoiseScale, NoiseTrajectory, Note, Run, Verdict
from pybatch.report import branches, claims, curves
from pybatch.report.layout import Section, Table
from pybatch.report.noise_figures import trajectory_table

# Figures of the record that are not printed, and so need no explanation when they are null.
_SEEN = {
    "batch",
    "status",
    "step_ms",
    "step_ms_low",
    "step_ms_high",
    "samples_per_s",
    "mfu_measured",
    "memory_bytes",
}
_UNSEEN = {f"batches.{f.name}" for f in fields(BatchPoint) if f.name not in _SEEN} | {"ceilings.datasheet_flops"}

_SOURCES = {"noise": "gradient noise", "branch": "branched runs", "sweep": "steps to target"}


def title(run: Run) -> str:
    """What was measured, and where, in one line."""
    measured = run.capacity or run.convergence
    if measured is None or measured.workload is None or measured.device is None:
        return "pybatch bench"
    work, device = measured.workload, measured.device
    model = f"{work.model}, " if work.model else ""
    place = f"{device.name}, {device.cores} cores" if device.kind == "cpu" and device.cores else device.name
    return f"{work.name} ({model}{n.count(work.parameters)} parameters, {work.dtype}) on {place}"


def sections(run: Run) -> list[Section]:
    """The sections of a run that were measured, the verdict last."""
    found = []
    if run.capacity is not None:
        found.append(_capacity(run.capacity))
    if run.noise is not None:
        found.append(_noise(run.noise, unit_of(run)))
    if run.trajectory is not None:
        found.append(_trajectory(run.trajectory))
    if run.convergence is not None and run.convergence.curves:
        found += curves.sections(run.convergence, unit_of(run)) + claims.sections(run)
    if run.convergence is not None and run.convergence.branches:
        found.append(branches.section(run.convergence, unit_of(run)))
    if run.distributed is not None:
        found.append(_distributed(run.distributed))
    if run.verdict is not None:
        found.append(_verdict(run.verdict))
    if run.notes:
        found.append(Section("Run", notes=_notes(run.notes)))
    return found


def unit_of(run: Run) -> str:
    """What an example of this run's batches is called."""
    for part in (run.capacity, run.convergence):
        if part is not None and part.workload is not None:
            return part.workload.unit
    return "examples"


def _notes(notes: tuple[Note, ...]) -> tuple[str, ...]:
    """What a reader of this page needs: notes on figures that have no place here are left to the record."""
    return tuple(f"{note.figure}: {note.text}" for note in notes if note.figure not in _UNSEEN)


def _capacity(capacity: Capacity) -> Section:
    unit = capacity.workload.unit if capacity.workload else "examples"
    ceiling = capacity.ceiling_samples_per_s
    table = Table(
        heads=("batch", "step ms", "±", f"{unit}/s", "ceiling", "MFU", "memory", "bound"),
        rows=tuple(_row(point, ceiling) for point in capacity.batches),
    )
    fit, lines = capacity.model, []
    if fit is not None:
        lines.append(
            (
                "ceiling",
                f"{n.count(ceiling)} {unit}/s {n.interval(fit.ceiling_low, fit.ceiling_high)}, modelled ({fit.model})",
            )
        )
        lines.append(
            ("half batch", f"{n.number(fit.half_batch)} {n.interval(fit.half_low, fit.half_high)}: half the ceiling")
        )
    if capacity.saturation_batch is not None:
        gain = n.share(fit.gain) if fit else "5 %"
        where = (
            f"; {n.count(capacity.saturation_measured)} is the smallest measured within 5 % of the ceiling"
            if capacity.saturation_measured
            else ""
        )
        band = n.interval(capacity.saturation_low, capacity.saturation_high)
        lines.append(("saturation", f"{n.number(capacity.saturation_batch)} {band}: doubling gains < {gain}{where}"))
    if capacity.max_batch is not None:
        how = "a step of it ran" if capacity.max_batch_verified else "predicted, not run"
        lines.append(("largest fit", f"{n.count(capacity.max_batch)} ({how})"))
    lines += _modes(capacity)
    if capacity.ceilings is not None:
        lines.append(("roofs", _roofs(capacity.ceilings)))
    return Section("Capacity", table, tuple(lines), notes=(*_left_out(capacity), *_notes(capacity.notes)))


def _modes(capacity: Capacity) -> list[tuple[str, str]]:
    """How steps were run where that was not eagerly, and the first steps after a rest."""
    lines = []
    timed = [p for p in capacity.batches if p.step_ms is not None]
    bursts = [f"{n.number(p.burst_step_ms)} at {n.count(p.batch)}" for p in timed if p.burst_step_ms is not None]
    if bursts:
        lines.append(("burst", f"ms a step in the first 100 after a rest, by batch: {', '.join(bursts)}"))
    if capacity.mode == "eager":
        return lines
    what: list[str] = [capacity.mode]
    compiling = [p.compile_s for p in capacity.batches if p.compile_s is not None]
    if compiling:
        what.append(
            f"compiling took {n.number(sum(compiling))} s for {len(compiling)} batch size{'s' * (len(compiling) > 1)}"
        )
    overheads = [p.launch_overhead_ms for p in timed if p.launch_overhead_ms is not None]
    if overheads:
        what.append(f"launching costs an eager step {n.number(min(overheads))} to {n.number(max(overheads))} ms")
    return [*lines, ("steps", "; ".join(what))]


def _left_out(capacity: Capacity) -> tuple[str, ...]:
    """Why batches have no figures, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for point in capacity.batches:
        if point.status != "ok":
            reasons.setdefault(point.reason or "no reason was kept", []).append(n.count(point.batch))
    return tuple(f"batch {', '.join(batches)}: {reason}" for reason, batches in reasons.items())


def _roofs(roofs: Ceilings) -> str:
    sheet = f" (datasheet {n.rate(roofs.datasheet_flops, 'FLOP/s')})" if roofs.datasheet_flops else ""
    return f"{n.rate(roofs.gemm_flops, 'FLOP/s')} matrix product{sheet}, {n.rate(roofs.copy_bytes_per_s, 'B/s')} copy"


def _row(point: BatchPoint, ceiling: float | None) -> tuple[str, ...]:
    if point.status != "ok":
        return (n.count(point.batch), "", "", point.status.replace("_", " "), "", "", n.memory(point.memory_bytes), "")
    spread = None
    if point.step_ms_low is not None and point.step_ms_high is not None:
        spread = (point.step_ms_high - point.step_ms_low) / 2
    share = point.samples_per_s / ceiling if point.samples_per_s and ceiling else None
    return (
        n.count(point.batch),
        n.number(point.step_ms),
        n.number(spread, 1),
        n.rounded(point.samples_per_s),
        n.share(share),
        n.share(point.mfu_measured),
        n.memory(point.memory_bytes),
        point.bound_by or n.MISSING,
    )


def _noise(noise: NoiseScale, unit: str) -> Section:
    if noise.status == "resolved":
        value = f"{n.number(noise.b_simple)} {n.interval(noise.low, noise.high)} {unit}"
    elif noise.status == "lower_bound":
        value = f"at least {n.number(noise.low)} {unit}: |G|² is not separated from zero"
    else:
        value = "unresolved"
    lines = [("B_simple", value)]
    if noise.counted is not None and noise.counted.b_simple is not None:
        own = noise.counted
        value = f"{n.number(own.b_simple)} {n.interval(own.low, own.high)} {own.unit}"
        lines.append(("the same", f"{value}, at {n.number(own.per_example)} {own.unit} per example"))
    if noise.warmup_steps is not None:
        loss = f", where the training loss was {n.number(noise.loss)}" if noise.loss is not None else ""
        when = f"after {n.counted(noise.warmup_steps, 'warm-up step')}"
        if noise.stretch_steps:
            when = f"over {n.counted(noise.stretch_steps, 'training step')} {when}"
        lines.append(("measured", f"{when}{loss}"))
    if noise.steps:
        pair = ""
        if noise.small_batch and noise.large_batch:
            pair = f" of gradients over {n.number(noise.small_batch)} and {n.number(noise.large_batch)} {unit}"
        lines.append(("from", f"{n.counted(noise.steps, 'pair')} of norms{pair} ({noise.source})"))
    return Section("Gradient noise scale", lines=tuple(lines), notes=_notes(noise.notes))


def _trajectory(found: NoiseTrajectory) -> Section:
    lines = (("from", f"{found.source}, in {found.unit or 'examples'}"),)
    return Section("Noise scale along training", trajectory_table(found), lines, notes=_notes(found.notes))


def communication(verdict: Verdict) -> str:
    """What the verdict's figures of several devices stand on."""
    inputs = next((r.inputs for r in verdict.reasons if r.figure == "useful_devices"), {})
    measured = inputs.get("measured_devices")
    if measured is None:
        return "modelled, without communication"
    return f"modelled, with the communication measured on {n.count(float(measured))} devices"


def _distributed(found: Distributed) -> Section:
    table = Table(
        heads=("devices", "batch each", "compute ms", "step ms", "±", "efficiency"),
        rows=tuple(
            (
                n.count(point.devices),
                n.count(point.batch),
                n.number(point.compute_ms),
                n.number(point.step_ms),
                n.number(
                    (point.step_ms_high - point.step_ms_low) / 2 if point.step_ms_high and point.step_ms_low else None,
                    1,
                ),
                n.share(point.compute_ms / point.step_ms),
            )
            for point in found.points
        ),
    )
    lines = []
    if found.fit is not None:
        fit = found.fit
        rate = n.rate(fit.bandwidth_bytes_per_s, "B/s")
        lines.append(("all-reduce", f"{rate}, {n.number(1e6 * fit.latency_s)} µs a message"))
        misfit = f"misses the measured steps by {n.share(fit.rms_log_error)} (rms)"
        lines.append(("overlap", f"gamma {n.number(fit.gamma)} (1: none, large: full); the fit {misfit}"))
    return Section(f"Several devices ({found.backend})", table, tuple(lines), notes=_notes(found.notes))


def _verdict(verdict: Verdict) -> Section:
    critical = f"{n.number(verdict.critical_batch)} {n.interval(verdict.critical_low, verdict.critical_high)}"
    if verdict.critical_source in _SOURCES:
        critical += f" by {_SOURCES[verdict.critical_source]}"
    best, optimum = n.count(verdict.best_batch), n.interval(verdict.best_low, verdict.best_high, n.count)
    if optimum:
        best += f", the modelled optimum is in {optimum}"
    lines = [("critical batch", critical), ("best batch", best), ("limited by", verdict.limit)]
    if verdict.time_to_target is not None:
        lines.append(("time to target", f"{n.number(verdict.time_to_target)} s on one device (modelled)"))
    if verdict.useful_devices is not None:
        devices = f"up to {n.count(verdict.useful_devices)}" if verdict.useful_devices > 1 else "one"
        lines.append(("devices worth it", f"{devices} ({communication(verdict)})"))
    twice = next((reason.inputs for reason in verdict.reasons if reason.figure == "doubling"), None)
    if twice is not None:
        said = ", ".join(
            f"{n.number(float(twice[f'{name}_factor'] or 0), 2)} times the {name}"
            for name in ("steps", "examples", "time", "energy")
            if twice.get(f"{name}_factor") is not None
        )
        lines.append(("twice the batch", f"{said} (modelled)"))
    return Section("Verdict", lines=tuple(lines), text=verdict.text, notes=_notes(verdict.notes))
