"""A sweep: trials over batch sizes, learning-rate rules and seeds, and the curves they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pybatch.base.errors import Interrupted, StoreError, UsageError
from pybatch.base.numerals import counted
from pybatch.device.environment import capture
from pybatch.device.identity import resolve
from pybatch.processes.workers import Inline, Processes, Workers
from pybatch.records import Convergence, Environment, NoiseScale, Note
from pybatch.scaling import SEARCHED
from pybatch.sweep.archive import describe_sweep
from pybatch.sweep.driver import Found, Sweep
from pybatch.sweep.live import Live
from pybatch.sweep.plan import MAX_STEPS, Plan
from pybatch.sweep.store import Store
from pybatch.sweep.sweep_record import record
from pybatch.training.fingerprint import fingerprint
from pybatch.workloads.base import Progress, Workload


def measure_convergence(
    workload: Workload,
    batches: Sequence[int],
    rules: Sequence[str] = (SEARCHED,),
    seeds: int = 3,
    *,
    seed: int = 0,
    target: Mapping[str, float] | None = None,
    optimizer: str = "sgd",
    options: Mapping[str, Any] | None = None,
    rates: Sequence[float] | None = None,
    search: str = "race",
    base_batch: int | None = None,
    base_rate: float | None = None,
    max_steps: int = MAX_STEPS,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    gap_epochs: float | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    jobs: int = 1,
    ray: str | None = None,
    noise: NoiseScale | Callable[[], NoiseScale | None] | None = None,
    progress: Progress | None = None,
    found: Found | None = None,
    environment: Environment | None = None,
) -> Convergence:
    """Steps to target against batch size, for each learning-rate rule, with fitted critical batches.

    Args:
        workload: what to train. Its batches are drawn with replacement, so a batch may exceed the data set.
        batches: batch sizes, in examples.
        rules: names of `pybatch.scaling.rules()`. "tuned" searches the rate at every batch size; the others start from
            the rate at `base_batch`, tuned or given.
        seeds: training runs of each batch size and rate, each with a model and a data order of its own.
        seed: of the first of them; the others count up from it. With a store, more `seeds` add to those it holds, and
            another `seed`, at least `seeds` away, repeats the experiment.
        target: losses to reach, by split; None: the workload's own.
        optimizer: a name of `pybatch.optim`, in any case.
        options: its arguments but the learning rate, such as {"momentum": 0.9}.
        rates: first learning rates of a search; None: 12, a factor of 2 apart. Where the best one is the lowest or
            highest, more are tried; then two halfway beside it.
        search: "race" tries every rate with the first seed, and runs the other seeds at the rates that can still have
            the least median; "grid" runs every seed at every rate; or an Optuna sampler ("tpe", "qmc", "random",
            "cmaes") between the ends of `rates`.
        base_batch: where the rules start; None: the smallest of `batches`.
        base_rate: their learning rate there; None: the one of the fewest steps to each target, which is sought first.
        max_steps: a trial is given up then; earlier after 4 times the steps the base batch took (times B_0 / B below
            it), and in a search after 1.5 times the median steps of the best rate. Where neither the base batch nor
            the largest one reaches a target, the others are not tried.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32" or "bf16" (autocast over fp32 parameters).
        gap_epochs: compare test losses after so many epochs too, and after the steps that the largest batch takes in
            them: when all else is done, the runs at each batch size's rate are made again, to that length. None: at
            the train target alone.
        store: SQLite file that keeps every trial; None: nothing is kept.
        resume: go on with a store that holds trials; only what is missing runs.
        jobs: processes that train at the same time.
        ray: "auto" or HOST:PORT: train as tasks of a Ray cluster instead.
        noise: the gradient noise scale, for its ratio to the critical batches; or a function that measures it, called
            once the arguments and the store are found good.
        progress: called with (what is being done, share done).
        found: called with a heading, then with a row for each batch size and rule as it is known.
        environment: of the run, for the store; None: captured now.

    Returns:
        One curve for each rule and split. What is missing in them is said in their notes.

    Raises:
        UsageError: an argument that cannot work, or a target met before the first step.
        WorkloadError: the workload fails at the base batch; elsewhere the record says so.
        Interrupted: on Ctrl-C (KeyboardInterrupt), `partial` holding the Convergence of what was done.
    """
    place = resolve(device)
    plan = Plan(
        workload,
        batches=batches,
        rules=rules,
        seeds=seeds,
        seed=seed,
        target=target,
        optimizer=optimizer,
        options=options or {},
        rates=rates,
        search=search,
        base_batch=base_batch,
        base_rate=base_rate,
        max_steps=max_steps,
        dtype=dtype,
        gap_epochs=gap_epochs,
    )
    if jobs < 1:
        raise UsageError(f"jobs {jobs} is below 1. Give the number of processes that train at the same time.")
    plan.check_start(workload, place)
    where = environment or capture(seed=seed)
    with Store(Path(store) if store is not None else None, where) as kept:
        if len(kept) and not resume:
            raise UsageError(
                f"store '{store}' holds {counted(len(kept), 'trial')}. Add --resume (resume=True) to run only what is "
                "missing, or name another file."
            )
        scale = noise() if callable(noise) else noise
        live = Live(kept.put, progress, alone=jobs == 1 and ray is None)
        with _workers(workload, live, place, jobs, ray) as workers:
            identity = fingerprint(workload)
            sweep = Sweep(plan, kept, workers, identity, place, found, live)
            asked = describe_sweep(
                identity, plan.group, plan.batches, record(workload, plan, place), seed=seed, search=plan.searched
            )
            sweep.begin(kept.keep_sweep(asked))
            try:
                sweep.run()
                return sweep.result(workload, scale)
            except KeyboardInterrupt:
                text = "interrupted: what was done until then is kept"
                raise Interrupted(sweep.result(workload, scale, (Note("convergence", text),))) from None
            except StoreError as error:
                return sweep.result(workload, scale, (Note("trials", str(error)),))


def _workers(workload: Workload, live: Live, device: torch.device, jobs: int, ray: str | None) -> Workers:
    if ray is not None:
        from pybatch.processes.ray import Cluster

        return Cluster(workload, live.deliver, device, ray)
    if jobs > 1:
        return Processes(workload, live.deliver, device, jobs)
    return Inline(workload, live.deliver, device, live)
