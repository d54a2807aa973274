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

    One sweep given twice, as its record and in its store, counts once, as it was last. Two sweeps of one workload, or
    two bench runs, stay apart: which of them belong together is not known.
    """
    runs = _latest(runs)
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


def _latest(runs: Sequence[Run]) -> list[Run]:
    """Runs with one state of each experiment, the latest, where the first of its states stood.

    An experiment whose seeds are pooled in another record, and which has learned nothing since, is in that one.
    """
    pools = {name: run for run in runs if run.convergence is not None for name in run.convergence.pooled}
    kept: dict[object, Run] = {}
    for place, run in enumerate(runs):
        steps = run.convergence
        name = steps.experiment if steps is not None and run.capacity is None else None
        if name in pools and _changed(run) <= _changed(pools[name]):
            continue
        known = kept.get(name)
        if name is None or known is None or _changed(run) > _changed(known):
            kept[name if name is not None else place] = run
    return list(kept.values())


def _changed(run: Run) -> str:
    return (run.convergence.changed if run.convergence is not None else None) or ""


def _alike(capacity: Capacity | None, steps: Convergence | None) -> bool:
    """Whether both are of one workload in one precision, on a device of one name."""
    if capacity is None or steps is None or None in (capacity.workload, capacity.device, steps.workload, steps.device):
        return False
    assert capacity.workload is not None  # for the type checker, here and below
    assert steps.workload is not None
    assert capacity.device is not None
    assert steps.device is not None
    # What a sweep chooses itself.
    apart: dict[str, Any] = {"target": {}, "learning_rate": None, "reference_batch": None}
    apart |= {"optimizer": None, "optimizer_options": {}}
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
