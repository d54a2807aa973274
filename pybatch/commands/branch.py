"""`pybatch branch`: the critical batch along a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pybatch.base.arguments import check_seed
from pybatch.base.errors import UsageError
from pybatch.base.ranges import LARGEST
from pybatch.commands import flags
from pybatch.commands.assignments import parse_optimizer, parse_train_target
from pybatch.commands.measuring import (
    RATE,
    SEEDS,
    STEPS,
    Delivery,
    Subject,
    check_between,
    check_budget,
    numbers,
    typed,
)
from pybatch.jobs.options import BranchOptions


def branch(
    workload: flags.Workload = "digits",
    model: flags.Model = None,
    data: flags.Data = None,
    option: flags.Dials = None,
    batch: Annotated[int | None, typer.Option(help="The base run's batch size. Default: the workload's.")] = None,
    factors: Annotated[
        str | None, typer.Option(help="Branches' batch sizes in base batches: '0.5,1,2,4'. Default: 0.25 to 32.")
    ] = None,
    checkpoints: Annotated[
        str, typer.Option(help="Steps of the base run at which to branch: '50,200,800'.")
    ] = "50,200,800",
    optimizer: Annotated[
        str | None,
        typer.Option(help="One of 'pybatch list', as 'sgd:momentum=0.9'. Default: the workload's own, else adamw."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Rate at the base batch. Default: the workload's.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How the rate follows the batch. Default: sqrt, for SGD linear.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeats of every branch.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Share of the base branch's last loss a batch may lose.")] = 0.02,
    target: Annotated[
        str | None,
        typer.Option(help="Train loss the run is to reach: '0.3'. Default: as low as the branches get."),
    ] = None,
    gpu: flags.Gpu = None,
    cpu: flags.Cpu = False,
    dtype: flags.Dtype = "fp32",
    time_budget: Annotated[float, typer.Option(help="Seconds after which no further branch is begun.")] = 600.0,
    keep: Annotated[
        Path | None, typer.Option(help="Folder to keep the checkpoints in; they are found there again.")
    ] = None,
    seed: flags.Seed = 0,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """The critical batch along training, by branching from checkpoints with other batch sizes."""
    steps = [int(step) for step in numbers("checkpoints", checkpoints, r"[0-9]+", "50,200,800")]
    check_between("checkpoint", max(steps), 0, STEPS)
    ks = numbers("factors", factors, r"[0-9]*\.?[0-9]+", "0.5,1,2,4") if factors is not None else None
    for k in ks or ():
        check_between("factor", k, 0, 1e6, above=True)
    check_between("base batch", batch, 1, LARGEST)
    check_between("learning rate", lr, 0, RATE, above=True)
    check_between("seeds", seeds, 1, SEEDS)
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is no share of the loss. Give a number between 0 and 1, as 0.02.")
    name, chosen = parse_optimizer(optimizer, rated=True) if optimizer is not None else (None, {})
    own = chosen.pop("lr", None)
    options = BranchOptions(
        checkpoints=tuple(steps),
        time_budget=time_budget,
        dtype=dtype,
        factors=tuple(ks) if ks is not None else None,
        base_batch=batch,
        optimizer=name,
        options=chosen if name is not None else None,
        lr=lr if lr is not None else own,
        rule=rule,
        seeds=seeds,
        tolerance=tolerance,
        target=parse_train_target(target) if target is not None else None,
        seed=seed,
        folder=keep,
    )
    check_budget(time_budget)
    check_seed(seed)
    subject = Subject(workload, model, data, option, gpu, cpu)
    with Delivery(format_, output, quiet, verbose) as delivery:
        found, device = subject.find(dtype)
        from pybatch.jobs.branch import run_branches

        with delivery.measuring(time_budget) as progress:
            delivery.run = run_branches(found, options, device=device, command=typed(), progress=progress)
        status = delivery.deliver()
    raise typer.Exit(status)
