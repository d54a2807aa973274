"""The critical batch along a run, by branching from checkpoints (Merrill et al. 2025, "Critical Batch Size Revisited").

A run is trained at a base batch. From a checkpoint, branches go on with k times the batch, at a rate scaled by a rule,
for the same number of examples. Two answers come from them. The paper's: the largest batch whose smoothed loss after
those examples is within a tolerance of the base branch's. And the critical batch in the sense of a sweep: steps each
branch takes down to a common loss level, fitted as steps to a target are.

The loss is that of a fixed batch of training examples, looked at WINDOW times along each branch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pybatch.convergence import branch_summary, checkpoint
from pybatch.convergence.branch_summary import WINDOW, Losses
from pybatch.convergence.updates import optimizer_class
from pybatch.device.identity import describe, resolve
from pybatch.errors import Interrupted, UsageError
from pybatch.optim import FusedOptimizer
from pybatch.records import Branching, Convergence, Note
from pybatch.scaling import Base, Scaled, scale
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.session import Session

FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # below 1 too: the critical batch may lie below the base batch
CHECKPOINTS = (200,)  # steps: as long as the noise scale's warm-up
TOLERANCE = 0.02  # of the base branch's last loss
EVALUATED = 512  # examples of the fixed batch
EVALUATION_SEED = 2**31 - 1  # its seed, which no repeat has
_ADAPTIVE = {"adam", "adamw", "lion", "lamb"}  # rates of adaptive methods scale as sqrt(B) (Malladi et al. 2022)
_LOOK = 25  # steps of the base run between looks at the loss and the clock


def measure_branches(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    checkpoints: Sequence[int] = CHECKPOINTS,
    factors: Sequence[float] = FACTORS,
    base_batch: int | None = None,
    window: int | None = None,
    optimizer: str = "adamw",
    lr: float | None = None,
    rule: str | None = None,
    seeds: int = 3,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    time_budget: float = math.inf,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Convergence:
    """Train at the base batch, branch at checkpoints, and find the critical batch there.

    Args:
        workload: what to train.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32" or "bf16" (autocast over fp32 parameters).
        checkpoints: steps of the base run at which to branch, ascending.
        factors: k, the branches' batch sizes in base batches; 1, the base branch, is always among them. Those that
            make no whole batch are left out if not given by the caller.
        base_batch: examples; None: the workload's `reference_batch`.
        window: examples each branch trains on; None: 16 steps of the largest batch. It is rounded
            up so that every batch size makes whole steps.
        optimizer: one of pybatch's, by name.
        lr: rate at the base batch; None: the workload's.
        rule: how the rate follows the batch; None: sqrt for adaptive optimizers, linear for the others.
        seeds: repeats of every branch, each with batches of its own.
        tolerance: for the paper's criterion, as a share of the base branch's last loss.
        seed: of the model and of the base run's batches.
        time_budget: seconds; when they are over no further repeat is begun.
        folder: where checkpoints are kept, and found again by the same call; None keeps them in memory.
        progress: called with (what is being done, share done).

    Returns:
        The record, with one entry of `branches` a checkpoint.

    Raises:
        UsageError: an argument out of range, or a checkpoint in `folder` that is not this run's.
        WorkloadError: the workload fails, or the base run's loss is not finite.
        Interrupted: on Ctrl-C, `partial` holding the record so far.
    """
    base = workload.reference_batch if base_batch is None else base_batch
    batches = _batches(base, factors)
    _check(batches, checkpoints, seeds, tolerance, window, time_budget)
    rule = rule or ("sqrt" if optimizer.lower() in _ADAPTIVE else "linear")
    group = {"lr": workload.learning_rate if lr is None else lr}
    defaults = optimizer_class(optimizer)([torch.zeros(1, requires_grad=True)], **group).defaults
    scaled = {batch: scale(rule, {**defaults, **group}, batch, Base(base)) for batch in batches}
    place = resolve(device)
    unit = WINDOW * math.lcm(*batches)  # every branch takes whole steps between looks
    examples = unit * math.ceil((window or unit) / unit)
    plan = _Plan(base, examples, optimizer.lower(), rule, scaled, seeds, tolerance, time.monotonic() + time_budget)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        run = _Run(workload, place, dtype, seed, plan, folder, progress)
        try:
            for index, step in enumerate(sorted(set(checkpoints))):
                run.base_to(step)
                run.branch(step, index / len(checkpoints), 1 / len(checkpoints))
        except KeyboardInterrupt:
            raise Interrupted(run.result(complete=False)) from None
        return run.result()


@dataclass(frozen=True)
class _Plan:
    base: int
    examples: int
    optimizer: str
    rule: str
    scaled: dict[int, Scaled]  # by batch size
    seeds: int
    tolerance: float
    deadline: float


@dataclass
class _Trained:
    """A model with its optimizer, at some step."""

    session: Session
    optimizer: FusedOptimizer
    done: int = 0

    def advance(self, batch: int, rate: Callable[[int], float], steps: int) -> torch.Tensor:
        """Train for so many steps; returns the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.session.backward(self.session.batch(batch))
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.done)
            self.optimizer.step()
            self.done += 1
        return loss

    def evaluate(self, batch: Any) -> float:
        """The loss of a fixed batch in evaluation mode."""
        self.session.model.eval()
        loss = float(self.session.loss(batch).detach())
        self.session.model.train()
        return loss


@dataclass
class _Run:
    """One call of `measure_branches`."""

    workload: Workload
    device: torch.device
    dtype: str
    seed: int
    plan: _Plan
    folder: Path | None
    progress: Progress | None
    found: list[Branching] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base = self._trained(self.seed, self.plan.scaled[self.plan.base])
        self.held_out = Session(self.workload, self.device, self.dtype, EVALUATION_SEED).batch(EVALUATED)
        self.state: dict[str, Any] = {}
        self.trials = 0
        # What a checkpoint must agree with to be this run's.
        info = self.base.session.info
        self.identity = repr(
            (info, self.plan.optimizer, self.plan.scaled[self.plan.base].group, self.plan.base, self.seed)
        )
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"folder '{self.folder}' cannot be made: {error.strerror}. Name another.") from None

    def _trained(self, seed: int, scaled: Scaled) -> _Trained:
        session = Session(self.workload, self.device, self.dtype, seed)
        return _Trained(session, optimizer_class(self.plan.optimizer)(session.parameters, **scaled.group))

    def base_to(self, step: int) -> None:
        """Bring the base run to a step: from its checkpoint in the folder if there is one, else by training."""
        path = self.folder / f"step-{step}.pt" if self.folder is not None else None
        if path is not None and path.exists():
            self.state = checkpoint.load(path)
            if self.state.get("identity") != self.identity:
                raise UsageError(
                    f"checkpoint '{path}' belongs to another run (workload, options, optimizer, batch or seed "
                    "differ). Name another folder."
                )
            self._restore(self.base)
            return
        while self.base.done < step:
            self._say(f"base run: step {self.base.done} of {step}", len(self.found) / (len(self.found) + 1))
            rate = self.plan.scaled[self.plan.base].lr
            loss = self.base.advance(self.plan.base, rate, min(_LOOK, step - self.base.done))
            self.base.session.check_finite(loss, f"at step {self.base.done} of the base run, at rate {rate(0):g}")
        session = self.base.session
        self.state = {
            "identity": self.identity,
            "step": step,
            "model": _copied(session.model.state_dict()),
            "optimizer": _copied(self.base.optimizer.state_dict()),
            "generator": session.generator.get_state(),
        }
        if path is not None:
            checkpoint.save(path, self.state)

    def _restore(self, trained: _Trained) -> None:
        """Put the checkpoint into a model and its optimizer, whose own rate and batches stay."""
        own = [dict(group) for group in trained.optimizer.param_groups]
        trained.session.model.load_state_dict(self.state["model"])
        trained.optimizer.load_state_dict(_copied(self.state["optimizer"]))
        for group, kept in zip(trained.optimizer.param_groups, own, strict=True):
            group.update({key: value for key, value in kept.items() if key != "params"})
        if trained is self.base:
            trained.session.generator.set_state(self.state["generator"])
            trained.done = int(self.state["step"])

    def branch(self, step: int, begin: float, share: float) -> None:
        """All branches of the checkpoint the base run stands at."""
        plan = self.plan
        losses: Losses = {batch: [] for batch in plan.scaled}
        count = plan.seeds * len(plan.scaled)
        initial = self.base.evaluate(self.held_out)
        late = False
        for repeat in range(plan.seeds):
            for i, batch in enumerate(plan.scaled):
                if late := late or time.monotonic() >= plan.deadline:
                    break
                done = (repeat * len(plan.scaled) + i) / count
                self._say(f"branches at step {step}: batch {batch}, repeat {repeat + 1}", begin + share * done)
                losses[batch].append(self._one(batch, repeat, initial))
                self.trials += 1
        rates = {batch: scaled.lr(10**9) for batch, scaled in plan.scaled.items()}
        found = branch_summary.summarize(step, plan.base, plan.examples, rates, losses, plan.tolerance)
        self.found.append(found)
        if late:
            repeats = min(len(rows) for rows in losses.values())
            text = f"{repeats} of {plan.seeds} repeats at step {step} within the time budget. Raise it"
            self.notes.append(Note("branches", text))

    def _one(self, batch: int, repeat: int, initial: float) -> np.ndarray:
        """Losses [WINDOW + 1] of one branch, at equal numbers of examples; nan from where it diverged."""
        trained = self._trained(self.seed + 1 + repeat, self.plan.scaled[batch])
        self._restore(trained)
        found = np.full(WINDOW + 1, np.nan)
        found[0] = initial
        for look in range(1, WINDOW + 1):
            trained.advance(batch, self.plan.scaled[batch].lr, self.plan.examples // (WINDOW * batch))
            found[look] = trained.evaluate(self.held_out)
            if not math.isfinite(found[look]):
                found[look] = np.nan
                break
        return found

    def _say(self, what: str, share: float) -> None:
        if self.progress is not None:
            self.progress(what, min(1.0, share))

    def result(self, complete: bool = True) -> Convergence:
        """The record so far."""
        plan = self.plan
        lr = plan.scaled[plan.base].lr(10**9)
        text = f"base rate {lr:g}, other batches by the rule '{plan.rule}'"
        return Convergence(
            curves=(),
            notes=(*self.notes, Note("branches.learning_rate", text)),
            optimizer=plan.optimizer,
            seeds=plan.seeds,
            trials=self.trials,
            base_batch=plan.base,
            smoothing=f"train loss of {EVALUATED} fixed examples, smoothed over five looks, {WINDOW} a branch",
            complete=complete and not self.notes,
            branches=tuple(self.found),
            device=describe(self.device),
            workload=self.base.session.info,
        )


def _copied(state: Any) -> Any:
    """The same structure with tensors of its own, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def _batches(base: int, factors: Sequence[float]) -> list[int]:
    """The branches' batch sizes, ascending, the base batch among them."""
    if base < 1:
        raise UsageError(f"base batch {base} is below 1. A batch has at least one example.")
    for factor in factors:
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"factor {factor:g} makes no batch. Give positive numbers, such as 0.5,1,2,4.")
        if factors is not FACTORS and factor * base != round(factor * base):
            raise UsageError(f"factor {factor:g} makes {factor * base:g} of base batch {base}. Batches are whole.")
    return sorted({base, *(round(f * base) for f in factors if f * base == round(f * base))})


def _check(
    batches: list[int],
    checkpoints: Sequence[int],
    seeds: int,
    tolerance: float,
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
    if window is not None and window < 1:
        raise UsageError(f"window {window} holds no example. Give the examples a branch is trained on.")
    if not time_budget > 0:
        raise UsageError(f"time budget {time_budget} s leaves no time. Give seconds above 0.")
