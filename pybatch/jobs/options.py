"""What `bench`, `branch` and `watch` were asked for, in one object each from the flags to the job. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pybatch.workloads.running.choice import OptimizerChoice


@dataclass(frozen=True)
class BenchOptions:
    """How a workload is measured on a device, by `run_bench` and `run_bench_together`."""

    time_budget: float = 70.0  # seconds for all measurements together
    dtype: str = "fp32"  # or "bf16", "fp16": autocast over fp32 parameters
    batches: tuple[int, ...] | None = None  # batch sizes to time, in examples; None chooses them
    coarse: bool = False  # quadruple the batch from one size to the next, where a short time budget has to do
    thorough: bool = False  # take the critical batch from short branched runs, not from the noise scale alone
    seed: int = 0  # of the model, the data order and the resampling
    compile: bool = False  # time compiled steps; the noise scale is taken eagerly
    graph: bool = False  # time CUDA-graph replays; likewise
    command: str = ""  # what the user typed, for the record
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)  # before the workload's own
    reference_batch: int | None = None  # of the noise scale's training and of the rate; None: the workload's


@dataclass(frozen=True)
class BranchOptions:
    """How a run is branched, by `run_branches`: arguments of `measure_branches`, where None leaves it the choice."""

    checkpoints: tuple[int, ...]  # steps of the base run at which to branch
    time_budget: float  # seconds
    dtype: str = "fp32"
    factors: tuple[float, ...] | None = None  # the branches' batch sizes in base batches
    base_batch: int | None = None
    optimizer: str | None = None
    options: Mapping[str, Any] | None = None  # of the optimizer
    lr: float | None = None
    rule: str | None = None
    seeds: int = 3  # repeats of every branch
    tolerance: float = 0.02  # share of the base branch's last loss
    target: float | None = None  # train loss that the run is to reach
    seed: int = 0
    folder: Path | None = None  # where checkpoints are kept


@dataclass(frozen=True)
class WatchOptions:
    """How a training of the user's own is watched, by `jobs.watch.Watching`."""

    name: str = "notebook"  # of the script, for the record
    steps: int | None = None  # ends the script after so many; None: when it ends
    index: int | None = None  # of the optimizer by first step; None: that with most parameters
    time_budget: float = 30.0  # seconds of replays at its end
    command: str = ""  # what the user typed, for the record


def waiting_for(time_budget: float) -> str:
    """What a first Ctrl-C in a training that is watched leads to."""
    return f"verdict in up to {time_budget:g} s; Ctrl-C again for the record alone"
