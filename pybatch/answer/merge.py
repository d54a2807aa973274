"""A bench run and a sweep of the same workload as one run, whose verdict stands on the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pybatch.answer.critical import with_noise_ratio
from pybatch.answer.verdict import advise
from pybatch.records import Capacity, Convergence, Note, Run


def join(runs: Sequence[Run]) -> list[Run]:
    """Runs in their order, each sweep put into the one bench run of its workload and device, with a verdict anew.

    One sweep given twice, as its record and in its store, counts once. Two sweeps of one workload, or two bench runs,
    stay apart: which of them belong together is not known.
    """
    runs = _once(runs)
    sweeps = [r for r in runs if r.capacity is None and r.convergence is not None and r.convergence.curves]
    benches = [r for r in runs if r.capacity is not None and not (r.convergence and r.convergence.curves)]
    joined: dict[int, Run] = {}
    gone: set[int] = set()
    for bench in benches:
        own = [sweep for sweep in sweeps if _alike(bench.capacity, sweep.convergence)]
        if len(own) == 1 and sum(_alike(other.capacity, own[0].convergence) for other in benches) == 1:
            joined[id(bench)] = _joined(bench, own[0])
            gone.add(id(own[0]))
    return [joined.get(id(run), run) for run in runs if id(run) not in gone]


def _once(runs: Sequence[Run]) -> list[Run]:
    """Runs without a sweep's second record; of two the one that knows more."""
    kept: list[Run] = []
    for run in runs:
        steps = _steps(run)
        twin = next((i for i, other in enumerate(kept) if steps is not None and _steps(other) == steps), None)
        if twin is None:
            kept.append(run)
        else:
            kept[twin] = _fuller(kept[twin], run)
    return kept


def _fuller(one: Run, other: Run) -> Run:
    """Of two records of one sweep that with more test losses at equal budgets, and the noise scale of either."""
    before, after = _spent(one), _spent(other)
    if before == after:
        return other if one.noise is None and other.noise is not None else one
    more, less = (one, other) if before > after else (other, one)
    if more.noise is not None or less.noise is None or more.convergence is None:
        return more
    curves = tuple(with_noise_ratio(curve, less.noise) for curve in more.convergence.curves)
    return replace(more, noise=less.noise, convergence=replace(more.convergence, curves=curves))


def _spent(run: Run) -> tuple[int, float]:
    """How many test losses at equal epochs a sweep has, and after how many epochs."""
    assert run.convergence is not None  # the caller has looked
    losses = [loss for c in run.convergence.curves for p in c.points for loss in p.test_losses_at_epochs]
    return len(losses) - losses.count(None), run.convergence.gap_epochs or 0.0


def _steps(run: Run) -> object:
    """What a sweep found, whoever wrote it down; None of a run that is no sweep."""
    found = run.convergence
    if run.capacity is not None or found is None or not found.curves:
        return None
    points = [
        (c.rule, c.split, c.target, [(p.batch, p.steps, p.learning_rate, p.reached) for p in c.points])
        for c in found.curves
    ]
    return found.workload, found.device, found.optimizer, found.seeds, points


def _alike(capacity: Capacity | None, steps: Convergence | None) -> bool:
    """Whether both are of one workload in one precision, on a device of one name."""
    if capacity is None or steps is None or None in (capacity.workload, capacity.device, steps.workload, steps.device):
        return False
    assert capacity.workload is not None  # for the type checker, here and below
    assert steps.workload is not None
    assert capacity.device is not None
    assert steps.device is not None
    apart: dict[str, Any] = {"target": {}, "learning_rate": None}  # what a sweep chooses itself
    same = replace(capacity.workload, **apart) == replace(steps.workload, **apart)
    return same and (capacity.device.kind, capacity.device.name) == (steps.device.kind, steps.device.name)


def _joined(bench: Run, sweep: Run) -> Run:
    assert sweep.convergence is not None  # the caller has looked
    before = bench.convergence
    noise = bench.noise if bench.noise is not None else sweep.noise
    curves = tuple(with_noise_ratio(curve, noise) for curve in sweep.convergence.curves)
    steps = replace(sweep.convergence, curves=curves, branches=before.branches if before is not None else ())
    with_whom = f" with {steps.optimizer}" if steps.optimizer else ""
    text = (
        f"put together: step times of the run of {bench.created}, steps to target of the sweep{with_whom} of "
        f"{sweep.created}. An optimizer's own time is that of the former"
    )
    return replace(
        bench,
        noise=noise,
        convergence=steps,
        verdict=advise(bench.capacity, noise, steps, bench.distributed),
        complete=bench.complete and sweep.complete,
        notes=(*bench.notes, *sweep.notes, Note("verdict", text)),
    )
