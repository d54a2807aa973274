"""The critical batch along a run, by branching from checkpoints (Merrill et al. 2025, "Critical Batch Size Revisited").

A run is trained at a base batch. From a checkpoint, branches go on with k times the batch, at a rate scaled by a rule,
for the same number of examples. Two answers come from them. The paper's: the largest batch whose smoothed loss after
those examples is within a tolerance of the base branch's. And the critical batch in the sense of a sweep: steps each
branch takes down to a common loss level, or to the target, fitted as steps to a target are.

The loss is that of a fixed batch of training examples, looked at WINDOW times along each branch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pybatch.base.arguments import typed
from pybatch.base.errors import Interrupted, PybatchError, UsageError, carry
from pybatch.base.progress import told
from pybatch.branch.run import BranchedRun, BranchPlan, rated
from pybatch.branch.summary import WINDOW
from pybatch.device.disturbance import threads_left
from pybatch.device.generators import seeded
from pybatch.device.identity import resolve
from pybatch.records import Convergence, Note
from pybatch.scaling import SEARCHED
from pybatch.training.updates import arguments_of
from pybatch.workloads.base import Progress, Workload, checked
from pybatch.workloads.running.choice import OWN, OptimizerChoice, is_own
from pybatch.workloads.running.optimizers import has_own, optimizer_class, rate_of
from pybatch.workloads.running.session import Session

FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # below 1 too: the critical batch may lie below the base batch
CHECKPOINTS = (200,)  # steps: as long as the noise scale's warm-up
TOLERANCE = 0.02  # of the base branch's last loss


@told
@typed
def measure_branches(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    checkpoints: Sequence[int] = CHECKPOINTS,
    factors: Sequence[float] = FACTORS,
    base_batch: int | None = None,
    window: int | None = None,
    optimizer: str | None = None,
    options: Mapping[str, Any] | None = None,
    lr: float | None = None,
    rule: str | None = None,
    tune: bool | None = None,
    seeds: int = 3,
    tolerance: float = TOLERANCE,
    target: float | None = None,
    seed: int = 0,
    time_budget: float = math.inf,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Convergence:
    """Train at the base batch, branch at checkpoints, and find the critical batch there.

    Args:
        workload: what to train.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32", "bf16" or "fp16" (autocast over fp32 parameters).
        checkpoints: steps of the base run at which to branch, ascending.
        factors: k, the branches' batch sizes in base batches; 1, the base branch, is always among them. Those that
            make no whole batch are left out if not given by the caller.
        base_batch: examples; None: the workload's `reference_batch`.
        window: examples each branch trains on; None: 16 steps of the largest batch. It is rounded
            up so that every batch size makes whole steps.
        optimizer: one of pybatch's, by name; or "own", the workload's. None: what the workload is trained with.
        options: its arguments but the rate.
        lr: rate at the base batch; None: the workload's.
        tune: whether the branches' rate at the base batch is searched at each checkpoint, by branches of half the
            window at rates a factor of 2 apart around `lr`; the base run keeps its own. None: where `lr` is not given.
            A critical batch at a rate that nobody tuned is mostly too small, by as much as 10.
        rule: how the rate follows the batch; None: sqrt for adaptive optimizers, linear for the others.
        seeds: repeats of every branch, each with batches of its own.
        tolerance: for the paper's criterion, as a share of the base branch's last loss.
        target: train loss that the run is to reach. Checkpoints past half of the steps to it are left out; where none
            is left, one at a quarter of them is taken. By default windows reach as far as the target asks for, and
            steps are counted to it where the base branch is there within half its window. None: to a loss that the
            base branch comes to.
        seed: of the model and of the base run's batches.
        time_budget: seconds. Default factors are cut from above to what it affords, by the base run's speed; when it
            is over, only what is finished counts.
        folder: where checkpoints are kept, and found again by the same call; None keeps them in memory.
        progress: called with (what is being done, share done); None: a line on stderr, on a terminal or in a notebook.

    Returns:
        The record, with one entry of `branches` a checkpoint.

    Raises:
        UsageError: an argument out of range, or a checkpoint in `folder` that is not this run's.
        WorkloadError: the workload fails, or the base run's loss is not finite, before a checkpoint was branched from;
            later the record says so.
        Interrupted: on Ctrl-C, `partial` holding the record so far.
    """
    checked(workload)
    base = workload.reference_batch if base_batch is None else base_batch
    batches = _batches(base, factors)
    _check(batches, checkpoints, seeds, tolerance, target, window, time_budget)
    place = resolve(device)
    if optimizer is None:
        asked = workload.asked_optimizer or OptimizerChoice()
        optimizer = asked.name or (OWN if has_own(workload) else "adamw")
        options = asked.options if options is None else options
    session = Session(workload, torch.device("cpu"), "fp32", seed)  # on which the optimizer shows its arguments
    group = arguments_of(session, optimizer, options or {})
    rule = rule or ("sqrt" if is_own(optimizer) and "betas" in group else _rule(optimizer))
    if rule in (SEARCHED, "adascale"):
        raise UsageError(
            f"rule {rule!r} needs more than a rate at the base batch. Take constant, linear, sqrt or adam-sde."
        )
    rate = lr
    if rate is None:
        rate = rate_of(session.optimizer())
    scaled = rated(group, rule, rate, base, batches)
    unit = WINDOW * math.lcm(*batches)  # every branch takes whole steps between looks
    examples = unit * math.ceil((window or unit) / unit)
    deadline = time.monotonic() + time_budget
    shrinks = factors is FACTORS and window is None
    tunes = lr is None if tune is None else tune
    name = optimizer.lower()
    plan = BranchPlan(base, examples, name, group, rule, scaled, seeds, tolerance, deadline, shrinks, tunes, target)
    with seeded(seed, place), threads_left(place):
        run = BranchedRun(workload, place, dtype, seed, plan, folder, progress)
        try:
            steps = run.steps_to_branch_at(sorted(set(checkpoints)))
            for index, step in enumerate(steps):
                if not run.base_to(step):
                    break
                run.branch(step, index / len(steps), 1 / len(steps))
        except KeyboardInterrupt:
            raise Interrupted(run.result(complete=False)) from None
        except PybatchError as error:
            if not run.found:
                raise
            run.notes.append(Note("branches", str(error)))
        except Exception as error:
            if run.found:
                carry(error, run.result(complete=False))
            raise
        return run.result()


def _rule(optimizer: str) -> str:
    """How the rate follows the batch, where nobody says it."""
    return "linear" if is_own(optimizer) else str(optimizer_class(optimizer).batch_rule)


def _batches(base: int, factors: Sequence[float]) -> list[int]:
    """The branches' batch sizes, ascending, the base batch among them."""
    if base < 1:
        raise UsageError(f"base batch {base} is below 1. A batch has at least one example.")
    for factor in factors:
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"factor {factor:g} makes no batch. Give positive numbers, such as 0.5,1,2,4.")
        if factors is not FACTORS and factor * base != round(factor * base):
            raise UsageError(
                f"factor {factor:g} of base batch {base} makes {factor * base:g} examples; a batch has whole ones. "
                "Leave it out, or take another base batch."
            )
    return sorted({base, *(round(f * base) for f in factors if f * base == round(f * base))})


def _check(
    batches: list[int],
    checkpoints: Sequence[int],
    seeds: int,
    tolerance: float,
    target: float | None,
    window: int | None,
    time_budget: float,
) -> None:
    if len(batches) < 2:
        raise UsageError("there is no factor but 1 to branch with. Give some, such as 0.5,1,2,4.")
    if not checkpoints or min(checkpoints) < 0:
        raise UsageError(f"checkpoints {list(checkpoints)}: give steps of the base run, 0 or more.")
    if seeds < 1:
        raise UsageError(f"seeds {seeds} leaves nothing to run. Give 1 or more; an interval needs 2.")
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance {tolerance:g} is no share of the loss. Give a number between 0 and 1, as 0.02.")
    if target is not None and not math.isfinite(target):
        raise UsageError(f"target {target} is no loss. Give the train loss that the run is to reach, or None.")
    if window is not None and window < 1:
        raise UsageError(f"window {window} holds no example. Give the examples a branch is trained on.")
    if not time_budget > 0:
        raise UsageError(f"time budget {time_budget} s leaves no time. Give seconds above 0.")
