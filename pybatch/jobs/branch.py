"""Branches along a run, as a record."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime

import torch

from pybatch.answer.course import course_of
from pybatch.answer.schedule import plan_schedule, rate_rule_of
from pybatch.base.errors import Interrupted, UsageError, carried, carry
from pybatch.branch.measurement import measure_branches
from pybatch.device.environment import capture
from pybatch.jobs.bench import INTERRUPTED
from pybatch.jobs.options import BranchOptions
from pybatch.records import Note, Run, Schedule
from pybatch.workloads.base import Progress, Workload


def run_branches(
    workload: Workload,
    options: BranchOptions,
    *,
    device: str | torch.device | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """The critical batch along a run, with the environment it was measured in.

    Args:
        workload: what to train.
        options: how.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        command: what the user typed, for the record.
        progress: called with (what is being done, share done).

    Raises:
        UsageError, WorkloadError: as `measure_branches`.
        Interrupted: on Ctrl-C, with the run so far in `.partial`.
    """
    environment = capture(seed=options.seed, command=command)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    given = {name: value for name, value in asdict(options).items() if value is not None}
    try:
        steps = measure_branches(workload, device=device, progress=progress, **given)
    except Interrupted as stop:
        notes = (Note("run", INTERRUPTED),)
        raise Interrupted(Run(created, environment, convergence=stop.partial, complete=False, notes=notes)) from None
    except Exception as error:
        if (partial := carried(error)) is not None:
            carry(error, Run(created, environment, convergence=partial, complete=False))
        raise
    run = Run(created, environment, convergence=steps, complete=steps.complete)
    try:
        return replace(run, batch_schedule=_schedule(run))
    except Exception as error:
        carry(error, run)
        raise


def _schedule(run: Run) -> Schedule | None:
    """Batch sizes for as long a run as was branched from; None of one checkpoint, or where one batch serves it all."""
    try:
        course = course_of(run)
        found = plan_schedule(course, examples=float(course.examples[-1]), rate_rule=rate_rule_of(run))
    except UsageError:
        return None
    return found if len(found.stages) > 1 and not course.doubt else None
