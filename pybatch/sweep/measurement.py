"""A sweep: trials over batch sizes, learning-rate rules and seeds, and the curves they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Unpack

import torch

from pybatch.base.arguments import typed
from pybatch.base.errors import Interrupted, PybatchError, StoreError, UsageError, WorkloadError, carry
from pybatch.base.numerals import counted
from pybatch.base.progress import told
from pybatch.device.environment import capture
from pybatch.device.identity import resolve
from pybatch.processes.workers import Inline, Processes, Workers
from pybatch.records import Convergence, Environment, NoiseScale, Note, Run
from pybatch.scaling import SEARCHED
from pybatch.sweep.checks import check_start, settled, subject_of
from pybatch.sweep.contents import NOISE
from pybatch.sweep.driver import Found, Sweep
from pybatch.sweep.options import SweepKeywords, SweepOptions
from pybatch.sweep.progress import SweepProgress
from pybatch.sweep.store import Store
from pybatch.workloads.base import Progress, Workload, checked

Noise = NoiseScale | Callable[[], NoiseScale | None] | None


@told
@typed
def measure_convergence(
    workload: Workload,
    batches: Sequence[int],
    rules: Sequence[str] = (SEARCHED,),
    seeds: int = 3,
    *,
    device: str | torch.device | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    ray: str | None = None,
    noise: Noise = None,
    progress: Progress | None = None,
    found: Found | None = None,
    environment: Environment | None = None,
    **options: Unpack[SweepKeywords],
) -> Convergence:
    """Steps to target against batch size, for each learning-rate rule, with fitted critical batches.

    Args:
        workload: what to train. Its batches are drawn with replacement, so a batch may exceed the data set.
        batches, rules, seeds, options: what is asked for: the fields of `pybatch.sweep.options.SweepOptions`.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        store: SQLite file that keeps every trial; None: nothing is kept.
        resume: go on with a store that holds trials; only what is missing runs.
        jobs: processes that train at the same time.
        ray: "auto" or HOST:PORT: train as tasks of a Ray cluster instead.
        noise: the gradient noise scale, for its ratio to the critical batches; or a function that measures it, called
            once the arguments and the store are found good.
        progress: called with (what is being done, share done); None: a line on stderr, on a terminal or in a notebook.
        found: called with a heading, then with a row for each batch size and rule as it is known.
        environment: of the run, for the store; None: captured now.

    Returns:
        One curve for each rule and split, of the whole experiment where a store holds more of it: batch sizes, rules
        and seeds that earlier sweeps added. What is missing in them is said in their notes.

    Raises:
        UsageError: an argument that cannot work, or a target met before the first step.
        WorkloadError: the workload fails before a trial has run; later the record says so.
        Interrupted: on Ctrl-C (KeyboardInterrupt), `partial` holding the Convergence of what was done.
    """
    if odd := set(options) - {each.name for each in fields(SweepOptions)}:
        raise TypeError(f"measure_convergence() got an unexpected keyword argument {min(odd)!r}")
    asked = SweepOptions(batches=batches, rules=rules, seeds=seeds, **options)
    try:
        run = measure_sweep(
            workload,
            asked,
            device=device,
            store=store,
            resume=resume,
            jobs=jobs,
            ray=ray,
            noise=noise,
            progress=progress,
            found=found,
            environment=environment,
        )
    except Interrupted as stop:
        raise Interrupted(stop.partial.convergence) from None
    assert run.convergence is not None
    return run.convergence


def measure_sweep(
    workload: Workload,
    options: SweepOptions,
    *,
    device: str | torch.device | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    ray: str | None = None,
    noise: Noise = None,
    progress: Progress | None = None,
    found: Found | None = None,
    environment: Environment | None = None,
) -> Run:
    """As `measure_convergence`, with the noise scale beside: what a reader of the store finds.

    A sweep reads its own store, in memory where none was named: there is one way to the record.
    """
    checked(workload)
    place, options = resolve(device), settled(options, workload)
    if jobs < 1:
        raise UsageError(f"jobs {jobs} is below 1. Give the number of processes that train at the same time.")
    where, path = environment or capture(seed=options.seed), Path(store) if store is not None else None
    if path is not None and path.exists() and not resume:  # before a step is run
        with Store(path, where) as kept:
            _check_empty(kept, path)
    check_start(workload, options, place)
    with Store(path, where) as kept:
        if not resume:
            _check_empty(kept, path)
        subject = subject_of(workload, options, place)
        scale, refusal = _measured(noise)
        whole = SweepProgress(kept.put, progress, alone=jobs == 1 and ray is None)
        with _workers(workload, whole, place, jobs, ray) as workers:
            number = kept.begin(subject, options, scale)
            if refusal is not None:
                kept.remark(number, NOISE, refusal)
            sweep = Sweep(options, subject, kept, number, workers, found, whole)
            try:
                sweep.run()
                return sweep.record()
            except KeyboardInterrupt:
                raise Interrupted(sweep.record()) from None
            except StoreError as error:
                return _with_note(sweep.record(), str(error))
            except WorkloadError as error:
                if scale is None:
                    raise
                return _with_note(sweep.record(), str(error))  # the noise scale is kept
            except PybatchError:
                raise
            except Exception as error:
                if sweep.measured:
                    carry(error, sweep.record())
                raise


def _check_empty(kept: Store, path: Path | None) -> None:
    if len(kept):
        raise UsageError(
            f"store '{path}' holds {counted(len(kept), 'trial')}. Add --resume (resume=True) to run only what is "
            "missing, or name another file."
        )


def _measured(noise: Noise) -> tuple[NoiseScale | None, str | None]:
    """The noise scale, or why it could not be measured: steps can be without it."""
    try:
        return noise() if callable(noise) else noise, None
    except Interrupted:
        raise KeyboardInterrupt from None  # no trial has run: there is nothing to keep
    except PybatchError as error:
        return None, str(error)


def _with_note(run: Run, text: str) -> Run:
    assert run.convergence is not None
    if any(note.text == text for note in run.convergence.notes):
        return run
    notes = (*run.convergence.notes, Note("trials", text))
    return replace(run, convergence=replace(run.convergence, notes=notes))


def _workers(workload: Workload, progress: SweepProgress, device: torch.device, jobs: int, ray: str | None) -> Workers:
    if ray is not None:
        from pybatch.processes.ray import Cluster

        return Cluster(workload, progress.deliver, device, ray)
    if jobs > 1:
        return Processes(workload, progress.deliver, device, jobs)
    return Inline(workload, progress.deliver, device, progress)
