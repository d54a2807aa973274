"""The arguments of `fit_steps`, checked: a table or one entry a run in, a `Table` out, or an error with the value."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from pybatch.base.errors import UsageError, unknown
from pybatch.fits import steps_model
from pybatch.fits.solver import Array
from pybatch.fits.steps_data import Table, between

LEAST, MOST = 1e-9, 1e12  # of batch sizes and steps in any unit; ranks of rates lie above
CODES = "math.inf for a run that did not reach it, -math.inf for one that diverged, math.nan for one nobody made"


def checked(
    batches: Any,
    steps: Any,
    model: str | None,
    cap: Any,
    rates: Any,
    resamples: int,
    before: Any = None,
    seeds: Sequence[Hashable] | None = None,
) -> Table:
    """The arguments of `fit_steps` as a table, or a UsageError that says what is wrong with which value."""
    if model is not None and model not in steps_model.MODELS:
        raise unknown("model", model, steps_model.MODELS)
    if resamples < 20:
        raise UsageError(f"resamples {resamples} cannot show a 95 % interval. Give 200 or more.")
    if seeds is not None:
        batches, steps, rates, cap, before = _pivoted(batches, steps, seeds, rates, cap, before)
    size = _numbers("batches", batches)
    for value in size.ravel():
        if not LEAST <= value <= MOST:
            raise UsageError(f"batch {value:g} is not a batch size. Give numbers from {LEAST:g} to {MOST:g}.")
    if size.ndim != 1 or not len(size):
        raise UsageError(f"batches has shape {size.shape}. Give a list of batch sizes.")
    if len(np.unique(size)) < len(size):
        twice = next(v for v in size if (size == v).sum() > 1)
        text = f"batch {twice:g} is given twice. Put its runs side by side: steps as batch x seed; or give one entry a "
        raise UsageError(f"{text}run, with `seeds`.")
    table = _numbers("steps", steps)
    if rates is None and table.ndim in (1, 2):
        table = table.reshape(1, len(table), -1) if table.size else table
    if table.ndim != 3 or table.shape[1] != len(size) or not table.size:
        shape = "[rates, batches, seeds]" if rates is not None else "[batches] or [batches, seeds]"
        raise UsageError(f"steps has shape {np.shape(steps)} for {len(size)} batches. Give {shape}.")
    finite = table[np.isfinite(table)]
    if (finite <= 0).any():
        raise UsageError(
            f"steps {finite[finite <= 0][0]:g} cannot be: the target was met before training. Leave the target out, "
            f"or give {CODES}."
        )
    if finite.size and not (finite.min() >= LEAST and finite.max() <= MOST):
        worst = finite.max() if finite.max() > MOST else finite.min()
        raise UsageError(f"steps {worst:g} are out of range: give {LEAST:g} to {MOST:g}, math.inf where not reached.")
    grid = _grid(rates, table.shape[0], len(size)) if rates is not None else None
    caps = _caps(cap, size, table)
    table, variance = _between(before, table, np.shape(steps), size)
    runs = ~np.isnan(table).all((0, 1))  # columns in which nobody made a run say nothing
    table, caps, variance = (values[..., runs] if runs.any() else values for values in (table, caps, variance))
    order = np.argsort(size)
    by_batch = grid[:, order] if grid is not None else None
    return Table(size[order], table[:, order], caps[:, order], by_batch, variance[:, order])


def _pivoted(batches: Any, steps: Any, seeds: Sequence[Hashable], rates: Any, cap: Any, before: Any) -> tuple[Any, ...]:
    """Entries of one run each as tables [rates, batches, seeds] with nan where there is no run, and batch sizes."""
    own = {"batches": batches, "steps": steps, "rates": rates, "cap": cap, "before": before}
    columns = {name: _numbers(name, value) for name, value in own.items() if value is not None}
    if "cap" in columns and columns["cap"].ndim == 0:
        columns["cap"] = np.full(len(seeds), float(columns["cap"]))
    for name, column in columns.items():
        if column.shape != (len(seeds),):
            text = f"{name} has shape {column.shape} for {len(seeds)} seeds. With `seeds`, give one entry for each run"
            raise UsageError(f"{text} in every list.")
    rate = columns.get("rates", np.ones(len(seeds)))
    for value in rate:
        if not (np.isfinite(value) and value > 0):
            raise UsageError(f"rate {value:g} is not a learning rate. Give a positive number for every run.")
    sizes, places = np.unique(columns["batches"]), _places(seeds, rate)
    grids = [np.unique(rate[columns["batches"] == size]) for size in sizes]
    shape = (max(map(len, grids), default=0), len(sizes), max(places, default=-1) + 1)
    found = {name: np.full(shape, np.nan) for name in columns}
    taken = np.zeros(shape, dtype=bool)
    for k, seed in enumerate(seeds):
        j = int(np.searchsorted(sizes, columns["batches"][k]))
        at = int(np.searchsorted(grids[j], rate[k])), j, places[k]
        if taken[at]:
            also = f" at rate {rate[k]:g}" if "rates" in columns else ""
            raise UsageError(f"batch {sizes[j]:g} has two runs of seed {seed}{also}. Give each run a seed of its own.")
        taken[at] = True
        for name, column in columns.items():
            found[name][at] = column[k]
    given = np.full(shape[:2], np.nan)
    for j, grid in enumerate(grids):
        given[: len(grid), j] = grid
    return sizes, found["steps"], given, found.get("cap"), found.get("before")


def _places(seeds: Sequence[Hashable], rate: Array) -> list[int]:
    """Which column of the table each run stands in: one a seed; or, where seeds name the runs and no rate has all of
    them, the seeds of each rate in turn, so that a resample draws among runs that were made."""
    names = list(dict.fromkeys(seeds))
    own = {value: [name for name in names if name in made] for value, made in _made(seeds, rate).items()}
    if max(map(len, own.values()), default=0) == len(names):
        return [names.index(seed) for seed in seeds]
    return [own[value].index(seed) for seed, value in zip(seeds, rate.tolist(), strict=True)]


def _made(seeds: Sequence[Hashable], rate: Array) -> dict[float, set[Hashable]]:
    made: dict[float, set[Hashable]] = {}
    for seed, value in zip(seeds, rate.tolist(), strict=True):
        made.setdefault(value, set()).add(seed)
    return made


def _between(before: Any, table: Array, shape: tuple[int, ...], size: Array) -> tuple[Array, Array]:
    """Steps and the variance of their logarithm, for runs whose loss was last seen above the target at `before`."""
    if before is None:
        return table, np.zeros_like(table)
    last = _numbers("before", before)
    if last.shape != shape:
        raise UsageError(f"before has shape {last.shape}, steps has {shape}. Give one for each run, nan where unknown.")
    last = last.reshape(table.shape)
    known = np.isfinite(table) & ~np.isnan(last)
    wrong = known & ~((last >= 0) & (last < table))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise UsageError(
            f"before {last[where]:g} at batch {size[where[1]]:g} is not from 0 to below its steps of {table[where]:g}. "
            "Give the step of the last evaluation above the target, nan where unknown."
        )
    centre, variance = between(np.where(known, last, 0.0), np.where(known, table, 1.0))
    return np.where(known, centre, table), np.where(known, variance, 0.0)


def _grid(rates: Any, count: int, batches: int) -> Array:
    grid = _numbers("rates", rates)
    if grid.shape not in ((count,), (count, batches)):
        raise UsageError(
            f"rates has shape {grid.shape} for steps of {count} rates and {batches} batches. "
            "Give [rates], or [rates, batches] where batches differ."
        )
    if not (np.isnan(grid) | ((grid > 0) & np.isfinite(grid))).all():
        raise UsageError("rates must be positive, or nan for a slot not used.")
    grid = np.broadcast_to(grid[:, None] if grid.ndim == 1 else grid, (count, batches)).astype(np.float64)
    if np.isnan(grid).all(0).any():
        raise UsageError("rates has a batch size without any rate. Leave that batch size out.")
    return grid


def _caps(cap: Any, size: Array, table: Array) -> Array:
    """Steps [rates, n, seeds] at which each run was given up; the largest number of steps where that is not known."""
    finite = np.where(np.isfinite(table), table, 0.0)
    if cap is None:
        return np.full(table.shape, max(float(finite.max()), 1.0))
    caps = _numbers("cap", cap)
    made = ~np.isnan(table)
    if caps.shape == table.shape:  # a run that nobody made has none, and one that reached needs none
        known = np.isfinite(caps) & (caps > 0)
        if (made & ~known & ~np.isnan(caps)).any() or (np.isposinf(table) & ~known).any():
            bad = caps[made & ~known & (~np.isnan(caps) | np.isposinf(table))][0]
            raise UsageError(
                f"cap {bad:g} is not a number of steps. Give every run that did not reach the steps it ran."
            )
        caps = np.where(known, caps, np.maximum(finite, 1.0))
    elif caps.shape not in ((), size.shape) or not ((caps > 0) & np.isfinite(caps)).all():
        raise UsageError(f"cap {cap!r} is not a number of steps. Give one positive number, or one per batch size.")
    else:
        caps = np.broadcast_to(caps if caps.ndim == 0 else caps[None, :, None], table.shape).astype(np.float64)
    over = finite > caps
    if over.any():
        at = tuple(int(i) for i in np.argwhere(over)[0])
        text = f"steps {finite[at]:g} at batch {size[at[1]]:g} are above the cap of {caps[at]:g}. Give the true cap."
        raise UsageError(text)
    return caps


def _numbers(name: str, value: Any) -> Array:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor that requires a gradient
        raise UsageError(f"{name} is not a table of numbers. Give lists of equal length, with {CODES}.") from None
