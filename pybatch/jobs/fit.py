"""A user's own logs of runs as a run's record: what `pybatch fit` prints. No torch here."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from os import PathLike

import numpy as np

from pybatch.base.errors import UsageError
from pybatch.fits.steps_csv import LoggedRuns, fit_logged, read_runs
from pybatch.fits.steps_data import best_rate
from pybatch.records import Convergence, ConvergencePoint, Curve, PointStatus, RateSteps, Run
from pybatch.scaling import LOGGED


def run_fit(path: str | PathLike[str], *, model: str | None = None, seed: int = 0) -> Run:
    """The steps of a file's runs at each batch size, and their fit; see `fit_steps_csv`.

    Raises:
        UsageError: with the line and the value that cannot be read.
    """
    logged = read_runs(path)
    fit = fit_logged(logged, model=model, seed=seed)
    points = tuple(_point(logged, batch) for batch in sorted(set(logged.batches)))
    several = any(len(point.rates) > 1 for point in points)
    curve = Curve(
        "tuned" if several else LOGGED,
        "train",
        points,
        fit.s_min,
        fit.critical_batch,
        fit.low,
        fit.high,
        b_min=fit.b_min,
        b_min_low=fit.b_min_low,
        b_min_high=fit.b_min_high,
        regimes=fit.regimes,
        fit=fit,
        notes=fit.notes,
    )
    seeds = len(set(logged.seeds))
    steps = Convergence((curve,), seeds=seeds, trials=len(logged.steps))
    return Run(datetime.now(UTC).isoformat(timespec="seconds"), None, convergence=steps)


def _point(logged: LoggedRuns, batch: float) -> ConvergencePoint:
    """One batch size: its rates with their runs, and the best of them as the fit chooses it."""
    own = [k for k, size in enumerate(logged.batches) if size == batch]
    rate = [math.nan if logged.rates is None else logged.rates[k] for k in own]
    grid = sorted(set(rate)) if logged.rates is not None else [math.nan]
    seeds = list(dict.fromkeys(logged.seeds[k] for k in own))
    if batch != round(batch) or batch < 1:
        raise UsageError(
            f"batch {batch:g} is no whole number of examples, which a record has. Use pybatch.fit_steps_csv."
        )
    table = np.full((len(grid), len(seeds)), np.nan)
    for k, lr in zip(own, rate, strict=True):
        table[grid.index(lr) if logged.rates is not None else 0, seeds.index(logged.seeds[k])] = logged.steps[k]
    index, median = best_rate(table[:, None])
    best, found = int(index[0]), float(median[0])
    runs = table[best][~np.isnan(table[best])]
    rates = tuple(_rate(lr, row) for lr, row in zip(grid, table, strict=True)) if logged.rates is not None else ()
    met = math.isfinite(found)
    lost: PointStatus = "diverged" if 2 * np.isneginf(runs).sum() >= len(runs) else "not_reached"
    return ConvergencePoint(
        batch=round(batch),
        steps=found if met else None,
        status="reached" if met else lost,
        seeds=len(runs),
        learning_rate=grid[best] if logged.rates is not None else None,
        reached=int(np.isfinite(runs).sum()),
        diverged=int(np.isneginf(runs).sum()),
        edge=met and len(grid) > 1 and best in (0, len(grid) - 1),
        rates=rates,
    )


def _rate(lr: float, row: np.ndarray) -> RateSteps:
    def status(value: float) -> PointStatus:
        if math.isfinite(value):
            return "reached"
        return "not_run" if math.isnan(value) else "not_reached" if value > 0 else "diverged"

    return RateSteps(
        lr, tuple(float(value) if math.isfinite(value) else None for value in row), tuple(map(status, row.tolist()))
    )
