"""A bench run and a sweep of the same workload as one run, whose verdict stands on the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pybatch.answer.critical import with_noise_ratio
from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError
from pybatch.records import Capacity, Convergence, Device, Note, Run, WorkloadInfo


def join(runs: Sequence[Run]) -> list[Run]:
    """Runs in their order, each sweep put into the one bench run of its workload and device, with a verdict anew.

    One sweep given twice, as its record and in its store, counts once, as it was last. One run and one sweep belong
    together whatever trained the sweep, which a note says; of several that of the same optimizer. Where that is none or
    more than one they stay apart, and a note says so: what belongs together is not known.
    """
    runs = _latest(runs)
    sweeps = [r for r in runs if r.capacity is None and r.convergence is not None and r.convergence.curves]
    benches = [r for r in runs if r.capacity is not None and not (r.convergence and r.convergence.curves)]
    joined: dict[int, Run] = {}
    gone: set[int] = set()
    for bench in benches:
        own = [sweep for sweep in sweeps if _alike(bench.capacity, sweep.convergence)]
        if not own:
            continue
        taken = _of_its_optimizer(bench, own)
        claims = [one for one in benches if _alike(one.capacity, own[0].convergence)]
        if taken is not None:
            claims = [one for one in claims if _of_its_optimizer(one, own) is taken]
            claims = [one for one in claims if _optimizer(one) == _swept(taken)] or claims
        if taken is not None and claims == [bench]:
            joined[id(bench)] = with_sweep(bench, taken)
            gone.add(id(taken))
        else:
            joined[id(bench)] = replace(bench, notes=(*bench.notes, _apart(own, taken is not None)))
    return [joined.get(id(run), run) for run in runs if id(run) not in gone]


Trained = tuple[str | None, dict[str, str]]


def _of_its_optimizer(bench: Run, sweeps: Sequence[Run]) -> Run | None:
    """The one sweep there is, or the one with the optimizer that this run was measured with, its options too."""
    name, _ = _optimizer(bench)
    found = list(sweeps)
    if len(found) > 1:
        found = [sweep for sweep in found if _swept(sweep)[0] == name]
    if len(found) > 1:
        found = [sweep for sweep in found if _swept(sweep) == _optimizer(bench)]
    return found[0] if len(found) == 1 else None


def _optimizer(bench: Run) -> Trained:
    work = bench.capacity.workload if bench.capacity is not None else None
    return (work.optimizer, work.optimizer_options) if work is not None else (None, {})


def _swept(sweep: Run) -> Trained:
    steps = sweep.convergence
    return (steps.optimizer, steps.optimizer_options) if steps is not None else (None, {})


def _apart(sweeps: Sequence[Run], claimed: bool) -> Note:
    """Why the verdict of a run stands without the sweeps beside it; `claimed`: as another run may have its sweep."""
    several = f"{len(sweeps)} sweeps" if len(sweeps) > 1 else "sweep"
    text = f"the verdict stands without the {several} of this workload ({', '.join(map(_named, sweeps))})"
    if claimed:
        return Note("verdict", f"{text}, as several runs of it are here. Give one run and one sweep")
    return Note("verdict", f"{text}: which of them belongs to it is not known. Give the record of one")


def _named(sweep: Run) -> str:
    name, given = _swept(sweep)
    options = ",".join(f"{key}={value}" for key, value in given.items())
    return ":".join(filter(None, (name or "optimizer not named", options)))


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
    return capacity is not None and steps is not None and alike(capacity.workload, capacity.device, steps)


def alike(workload: WorkloadInfo | None, device: Device | None, steps: Convergence) -> bool:
    """Whether a sweep is of this workload in its precision, on a device of this name."""
    if workload is None or device is None or steps.workload is None or steps.device is None:
        return False
    # What a sweep chooses itself.
    apart: dict[str, Any] = {"target": {}, "learning_rate": None, "reference_batch": None}
    apart |= {"optimizer": None, "optimizer_options": {}}
    same = replace(workload, **apart) == replace(steps.workload, **apart)
    return same and (device.kind, device.name) == (steps.device.kind, steps.device.name)


def check_sweep(sweep: Run, workload: WorkloadInfo, device: Device) -> None:
    """Raise UsageError where a record has no sweep, or one of another workload, precision or device."""
    steps = sweep.convergence
    if steps is None or not steps.curves:
        raise UsageError("--sweep: the record has no steps to a target. Give one made by 'pybatch sweep'.")
    if alike(workload, device, steps):
        return
    own, other = _words(workload, device), _words(steps.workload, steps.device)
    rest = " with other options or another model file" if own == other else ""
    raise UsageError(
        f"--sweep: it is of {other}{rest}, and this run of {own}. Sweep what is measured, or leave it out."
    )


def _words(workload: WorkloadInfo | None, device: Device | None) -> str:
    if workload is None or device is None:
        return "a workload or device that it does not name"
    model = f" ({workload.model})" if workload.model else ""
    return f"{workload.name}{model}, {workload.dtype}, on {device.name}"


def with_sweep(bench: Run, sweep: Run) -> Run:
    """A bench run with the steps of a sweep that is `alike`, and a verdict on both."""
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
