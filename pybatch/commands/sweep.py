"""`pybatch sweep`: steps to a target against batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pybatch.base.arguments import check_seed
from pybatch.base.errors import UsageError
from pybatch.base.ranges import LARGEST, parse_batches
from pybatch.commands import flags
from pybatch.commands.assignments import parse_optimizer, parse_targets
from pybatch.commands.measuring import (
    LONGEST,
    RATE,
    SEEDS,
    STEPS,
    Delivery,
    Subject,
    check_between,
    numbers,
    typed,
)

_RATE = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"


def sweep(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: '1,2,8', '16-2048*2', '16-64+16'.")] = "16-2048*2",
    rule: Annotated[
        str, typer.Option(help="Learning-rate rules of 'pybatch list': 'tuned', or several: 'constant,sqrt,tuned'.")
    ] = "tuned",
    seeds: Annotated[int, typer.Option(help="Trainings of each batch size and rate.")] = 3,
    target: Annotated[
        str | None, typer.Option(help="Losses to reach: 'train=0.1,test=0.2'. Default: the workload's.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="One of 'pybatch list', as 'sgd:momentum=0.9'. Default: the workload's."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="constant; cosine or wsd: the shortest training that ends at the target, annealed; average: of "
            "averaged weights; own: the workload's. Default: own where there is one, else constant."
        ),
    ] = None,
    beta2_rule: Annotated[
        str, typer.Option(help="Adam's second beta: constant, or half-life: the same in examples at every batch size.")
    ] = "constant",
    decay_rule: Annotated[
        str, typer.Option(help="Weight decay: constant; linear: with the batch size; timescale: with it over the rate.")
    ] = "constant",
    rates: Annotated[
        str | None, typer.Option(help="First learning rates: '0.01,0.1,1'. Default: 12, a factor of 2 apart.")
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="How rates are tried: race (one seed at all, the others where it came near its best), grid (each seed "
            "at each rate), or an Optuna sampler: tpe, qmc, random, cmaes."
        ),
    ] = "race",
    base_batch: Annotated[
        int | None, typer.Option(help="Where rules other than 'tuned' start. Default: the smallest batch.")
    ] = None,
    base_rate: Annotated[
        float | None, typer.Option(help="Their learning rate there. Default: tuned at the base batch.")
    ] = None,
    max_steps: Annotated[int, typer.Option(help="Steps after which a training is given up.")] = 5000,
    gap_epochs: Annotated[
        float | None, typer.Option(help="Compare test losses after so many epochs too, and after equal steps.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="SQLite file that keeps every training.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a store: only what is missing runs.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that train at the same time.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Train on a Ray cluster: auto, or HOST:PORT.")] = None,
    noise_budget: Annotated[
        float, typer.Option(help="Seconds for the noise scale, to compare with; 0 leaves it out.")
    ] = 10.0,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: flags.Dtype = "fp32",
    seed: Annotated[
        int,
        typer.Option(help="Of the noise scale and the first training; --seeds N counts up from it to seed + N - 1."),
    ] = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
    price: flags.Price = None,
) -> None:
    """Steps to a loss target against batch size, for each learning-rate rule, and the critical batch."""
    from pybatch.sweep.options import SweepOptions

    name, options = parse_optimizer(optimizer) if optimizer is not None else (None, {})
    if not 0 <= noise_budget <= LONGEST:
        raise UsageError(f"noise budget {noise_budget:g} s is out of range. Give seconds, or 0 to leave it out.")
    if resume and store is None:
        raise UsageError("--resume goes on with a store, and none is given. Add --store FILE.")

    check_seed(seed)
    first = numbers("rates", rates, _RATE, "0.01,0.1,1") if rates is not None else None
    for rate in first or ():
        check_between("rate", rate, 0, RATE, above=True)
    check_between("base rate", base_rate, 0, RATE, above=True)
    check_between("base batch", base_batch, 1, LARGEST)
    check_between("seeds", seeds, 1, SEEDS)
    check_between("max steps", max_steps, 1, STEPS)
    check_between("gap epochs", gap_epochs, 0, 1e6, above=True)
    check_between("jobs", jobs, 1, 1024)
    asked = SweepOptions(
        batches=parse_batches(batch),
        rules=[part.strip() for part in rule.split(",")],
        seeds=seeds,
        seed=seed,
        target=parse_targets(target) if target is not None else None,
        optimizer=name,
        options=options,
        schedule=schedule,
        beta2_rule=beta2_rule,
        decay_rule=decay_rule,
        rates=first,
        search=search,
        base_batch=base_batch,
        base_rate=base_rate,
        max_steps=max_steps,
        dtype=dtype,
        gap_epochs=gap_epochs,
    )
    subject = Subject(workload, model, data, option, gpu, cpu)
    with Delivery(format_, output, quiet, verbose, price) as delivery:
        found, device = subject.find(dtype)
        from pybatch.device.memory import keep_freed
        from pybatch.jobs.sweep import run_sweep

        keep_freed()
        with delivery.measuring() as progress:
            delivery.run = run_sweep(
                found,
                asked,
                noise_budget=noise_budget,
                device=device,
                store=store,
                resume=resume,
                jobs=jobs,
                ray=ray,
                command=typed(),
                progress=progress,
                found=progress.line,
            )
        delivery.kept = store
        status = delivery.deliver()
    raise typer.Exit(status)
