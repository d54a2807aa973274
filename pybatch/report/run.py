"""A run as what every format prints and draws: its sections and its plots, in the order of a reader's questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pybatch.answer.verdict import advise
from pybatch.base import numerals as n
from pybatch.records import Run, Schedule, Verdict
from pybatch.report import (
    branches,
    capacity,
    claims,
    devices,
    noise,
    schedule,
    step_times,
    steps,
    training,
    utilization,
    verdict,
)
from pybatch.report.layout import Section, details_of, examples_of, notes_of
from pybatch.report.plot import Plot


def title(run: Run) -> str:
    """What was measured, and where, in one line."""
    measured = run.capacity or run.convergence
    if measured is None and run.training is not None:
        return f"{run.training.name} ({run.training.model})"
    if measured is None and run.batch_schedule is not None:
        return "pybatch schedule"
    if measured is None and run.trajectory is not None:
        return "Noise scale along a training"
    if measured is None or measured.workload is None or measured.device is None:
        return "pybatch bench" if run.convergence is None else "Steps to a target, as logged"
    work, device = measured.workload, measured.device
    model = f"{work.model}, " if work.model else ""
    place = f"{device.name}, {device.cores} cores" if device.kind == "cpu" and device.cores else device.name
    return f"{work.name} ({model}{n.count(work.parameters)} parameters, {work.dtype}) on {place}"


def titles(runs: Sequence[Run]) -> list[str]:
    """The title of each; sweeps of one workload, which have the same, are told apart by what trained them."""
    found = []
    for run in runs:
        swept = run.convergence if run.capacity is None and len(runs) > 1 else None
        trained = f", swept with {swept.optimizer}" if swept is not None and swept.curves and swept.optimizer else ""
        found.append(f"{title(run)}{trained}")
    return found


def answer_of(run: Run) -> Verdict | Schedule | None:
    """What the page opens with: the run's verdict; of steps or noise alone, what they say of the critical batch."""
    if run.verdict is not None or run.capacity is not None:
        return run.verdict
    if run.batch_schedule is not None and run.noise is None and run.convergence is None:
        return run.batch_schedule
    found = advise(None, run.noise, run.convergence)
    known = (found.critical_batch, found.critical_low, found.critical_high)
    ran = run.convergence is not None and run.convergence.curves
    return found if ran or any(value is not None for value in known) else None


def unit_of(run: Run) -> str:
    """What an example of this run's batches is called."""
    return examples_of(run.capacity, run.convergence)


def sections(run: Run) -> list[Section]:
    """The sections of a run that were measured, the verdict last."""
    unit, swept, found = unit_of(run), run.convergence, []
    if run.training is not None:
        found.append(training.section(run.training, unit))
    if run.capacity is not None:
        found.append(capacity.section(run.capacity, run.noise.counted if run.noise is not None else None))
    if run.noise is not None:
        found.append(noise.section(run.noise, unit))
    if run.trajectory is not None:
        found.append(noise.trajectory_section(run.trajectory))
    if swept is not None and swept.curves:
        found += steps.sections(swept, unit)
        if any(curve.target is not None for curve in swept.curves):  # not of logs, which say little of how they came
            found += claims.sections(run)
    if swept is not None and swept.branches:
        found.append(branches.section(swept, unit))
    if run.distributed is not None:
        found.append(devices.section(run.distributed))
    if run.batch_schedule is not None:
        found.append(schedule.section(run.batch_schedule, unit))
    if run.verdict is not None:
        found.append(verdict.section(run.verdict, run.capacity, run.price))
    elif run.price is not None:
        found.append(Section("Verdict", lines=(verdict.cost(None, run.capacity, run.price),)))
    if run.notes:
        found.append(Section("Run", notes=(*notes_of(run.notes), *details_of(run.notes))))
    return found


def plots(run: Run, number: int = 0) -> list[Plot]:
    """All plots of a run, those that can't be drawn among them, named apart from those of other runs.

    Where the limits lie and why this batch; what was trained for it; then the device's own figures.
    """
    unit, swept = unit_of(run), run.convergence
    found = [*capacity.plots(run.capacity, run.verdict), *verdict.goodput_plots(run)]
    if swept is not None:
        found += [*steps.plots(swept, unit), *claims.plots(swept, unit)]
    found += training.plots(run.training)
    found += [*step_times.plots(run.capacity), *utilization.plots(run.capacity), *verdict.frontier_plots(run)]
    found += [*noise.plots(run.noise, run.trajectory, unit), *schedule.plots(run)]
    return [replace(plot, name=f"{plot.name}-{number}") for plot in found]
