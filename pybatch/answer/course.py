"""The critical batch along a run: from branches, from the noise scale, or by a law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.records import Note, Run
from pybatch.records.schedule import ScheduleSource

MOST = 2**40
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """The critical batch along a run at one batch size.

    Args:
        batch: of the run.
        examples: [k] seen, ascending, where the critical batch is known.
        critical: [k] examples, with its 95 % interval.
        low, high: [k]; nan: open.
        source: what it was taken from.
        notes: what a reader must know of it.
        doubt: why no schedule stands on it.
        advised: the best batch of the record's own verdict.
    """

    batch: int
    examples: Array
    critical: Array
    low: Array
    high: Array
    source: ScheduleSource
    notes: tuple[Note, ...] = ()
    doubt: str = ""
    advised: int | None = None  # the record's best batch, which counts step times as well

    def at(self, examples: Array, values: Array | None = None) -> Array:
        """The critical batch after so many examples of the run: rising, on the log scale, held beyond the ends."""
        from scipy.optimize import isotonic_regression  # takes long to import

        logs = np.log(self.critical if values is None else values)
        spread = np.log(self.high) - np.log(self.low)
        weights = np.where(np.isfinite(spread) & (spread > 0), spread, np.nanmax(np.append(spread, 1.0))) ** -2.0
        rising = isotonic_regression(logs, weights=weights).x
        return np.asarray(np.exp(np.interp(examples, self.examples, rising)))


def course_of(run: Run, batch: int | None = None) -> Course:
    """The critical batch along the run that this record holds: from branches, else from the noise scale.

    Args:
        run: with either.
        batch: of that run; None: as the record has it.

    Raises:
        UsageError: it holds neither along a run; the message says what to measure.
    """
    found = _of_branches(run) or _of_noise(run, batch)
    return replace(found, advised=run.verdict.best_batch if run.verdict is not None else None)


def law(coefficient: float, exponent: float, examples: float, batch: int) -> Course:
    """B_c = coefficient * D^exponent after D examples, as scaling laws have it.

    Raises:
        UsageError: a coefficient that is not above 0, or an exponent out of range.
    """
    if not (0 < coefficient < math.inf and -4 <= exponent <= 4):
        raise UsageError(f"law {coefficient:g},{exponent:g}: give a,b of B = a D^b, a above 0 and b from -4 to 4.")
    if exponent < 0:
        raise UsageError(
            f"law {coefficient:g},{exponent:g}: the critical batch falls along the run. Give b of 0 or more."
        )
    seen = np.geomspace(max(1.0, examples / 1e4), examples, 200)
    with np.errstate(over="ignore"):
        critical = coefficient * seen**exponent
    if not np.isfinite(critical).all() or critical[-1] > MOST:
        raise UsageError(f"law {coefficient:g},{exponent:g}: a critical batch of {critical[-1]:.3g} is out of range.")
    return Course(batch, seen, critical, critical, critical, "law")


def _of_branches(run: Run) -> Course | None:
    """From the branches of one run, where there are several checkpoints."""
    measured = run.convergence
    points = [at for at in measured.branches if at.fit is not None and at.fit.critical_batch] if measured else []
    if len(points) < 2:
        return None
    base = points[0].base_batch
    fits = [at.fit for at in points if at.fit is not None]
    past = [at for at in points if at.fit and (at.fit.critical_batch or 0.0) > max(p.batch for p in at.points)]
    notes: tuple[Note, ...] = ()
    if past:
        text = f"at {n.counted(len(past), 'checkpoint')} the critical batch is above the largest branch: extrapolated"
        notes = (Note("stages", text),)
    doubt = ""
    unbounded = sum(fit.low is None or fit.high is None for fit in fits)
    if 2 * unbounded > len(fits):
        doubt = f"{unbounded} of {len(fits)} critical batches along the run are not bounded on both sides"

    def of(values: Sequence[float | None]) -> Array:
        return np.array([math.nan if value is None else value for value in values], dtype=float)

    return Course(
        base,
        of([at.step * base for at in points]),
        of([fit.critical_batch for fit in fits]),
        of([fit.low for fit in fits]),
        of([fit.high for fit in fits]),
        "branches",
        notes,
        doubt,
    )


def _of_noise(run: Run, batch: int | None) -> Course:
    """From the noise scale along a run."""
    unit = None
    if run.trajectory is not None:
        points, unit = run.trajectory.points, run.trajectory.unit
    else:
        points = run.noise.trajectory if run.noise is not None else ()
        unit = run.noise.unit if run.noise is not None else None
    if run.noise is not None and run.noise.misled is not None:
        raise UsageError(f"no schedule comes from this record: {run.noise.misled.rstrip('.')}.")
    batch = batch or _batch(run)
    known = [p for p in points if p.status != "unresolved" and (p.b_simple or p.low)]
    if len(known) < 2 or batch is None:
        have = "one noise scale" if run.noise is not None and not points else f"{n.counted(len(known), 'reading')}"
        if len(known) > 1:
            raise UsageError(
                "this record does not say the batch of the run that its noise scale was read along. Give it: --batch N."
            )
        if run.training is not None:
            watched = n.counted(run.training.steps, "watched step")
            raise UsageError(
                f"a schedule needs the noise scale along the run, and {watched} gave {have} of it; two are the least, "
                "of 16 measured steps each. Watch the run for longer."
            )
        raise UsageError(
            f"a schedule needs the noise scale, or branches, along a run, and this record has {have}. Measure "
            "with 'pybatch watch train.py -o run.json', or 'pybatch branch --checkpoints 100,1000,5000 -o run.json'."
        )
    if unit is not None:
        raise UsageError(f"the noise scale of this record is counted in {unit}, and its batch is not. Give examples.")
    notes: tuple[Note, ...] = ()
    doubt = ""
    bounded = [p for p in known if not p.b_simple]
    if bounded:
        were = (
            "is a lower bound, and taken as it is" if len(bounded) == 1 else "are lower bounds, and taken as they are"
        )
        text = f"{len(bounded)} of {n.counted(len(known), 'reading')} of the noise scale {were}"
        notes = (Note("stages", text),)
        if 2 * len(bounded) > len(known):
            doubt = text
    values = [p.b_simple or p.low or math.nan for p in known]
    return Course(
        batch,
        np.array([(p.first_step + p.last_step) / 2 * batch for p in known]),
        np.array(values),
        np.array([p.low or math.nan for p in known]),
        np.array([p.high or math.nan for p in known]),
        "noise",
        notes,
        doubt,
    )


def _batch(run: Run) -> int | None:
    """The batch of the run that the noise scale was read along."""
    if run.training is not None and run.training.batch:
        return run.training.batch
    for part in (run.capacity, run.convergence):
        if part is not None and part.workload is not None and part.workload.reference_batch:
            return part.workload.reference_batch
    return round(run.noise.large_batch) if run.noise is not None and run.noise.large_batch else None
