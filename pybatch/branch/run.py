"""A run at a base batch, its checkpoints, and the branches that leave them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pybatch.base.errors import UsageError
from pybatch.base.numerals import number
from pybatch.branch import checkpoint
from pybatch.branch import summary as branch_summary
from pybatch.branch.summary import LATE, WINDOW, Losses
from pybatch.device.generators import seeded
from pybatch.device.identity import describe
from pybatch.fits.solver import Array
from pybatch.records import Branching, Convergence, Note
from pybatch.scaling import Base, Scaled, scale
from pybatch.training.fingerprint import fingerprint
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.loss_scale import LossScale
from pybatch.workloads.running.optimizers import Rates, public
from pybatch.workloads.running.session import Session, fixed_batches

_LOOK = 25  # steps of the base run between looks at the loss and the clock
_EARLY = 0.25  # of the steps to the target: where a run is branched from that is soon there
_AHEAD = 0.2  # of the time left, that may be spent to see how soon
_LEAST_STEPS = 2 * WINDOW  # of a branch that is to reach the target: one of fewer would hardly get there
_FEWEST = 5  # batch sizes kept: fewer bend no curve
_SEARCH = 3.5  # branches of the base batch that a search of rates takes, about: 7 of half a window
_FURTHEST = 5  # doublings of the rate in use that a search goes to


@dataclass(frozen=True)
class BranchPlan:
    base: int
    examples: int
    optimizer: str
    group: Mapping[str, Any]  # its hyper-parameters, but the rate
    rule: str
    scaled: dict[int, Scaled]  # by batch size
    seeds: int
    tolerance: float
    deadline: float
    shrinks: bool  # whether large batches may be left out to keep the deadline
    tunes: bool = False  # whether the base batch's rate is searched at each checkpoint
    target: float | None = None  # train loss that the run is to reach


def rated(group: Mapping[str, Any], rule: str, rate: float, base: int, batches: Sequence[int]) -> dict[int, Scaled]:
    """What each batch size trains with, by this rate at the base batch."""
    return {batch: scale(rule, {**group, "lr": rate}, batch, Base(base)) for batch in batches}


@dataclass
class Trained:
    """A model with its optimizer, at some step."""

    session: Session
    optimizer: torch.optim.Optimizer
    done: int = 0

    def __post_init__(self) -> None:
        self._rates = Rates(self.optimizer)

    def advance(self, batch: int, rate: Callable[[int], float], steps: int) -> torch.Tensor:
        """Train for so many steps; returns the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.session.backward(self.session.batch(batch))
            self._rates.set(rate(self.done))
            self.session.update(self.optimizer)
            self.done += 1
        return loss

    def evaluate(self, batch: Any) -> float:
        """The loss of a fixed batch in evaluation mode."""
        return float(self.session.evaluate(batch))


@dataclass
class BranchedRun:
    """One call of `measure_branches`."""

    workload: Workload
    device: torch.device
    dtype: str
    seed: int
    plan: BranchPlan
    folder: Path | None
    progress: Progress | None
    found: list[Branching] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)  # on what is missing
    asides: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute() if self.folder is not None else None  # user code may change it
        self.base = self._trained(self.seed, self.plan.scaled[self.plan.base])
        self.held_out = fixed_batches(self.workload, self.device, self.dtype)[0]
        self.untrained = self.base.evaluate(self.held_out)
        self.state: dict[str, Any] = {}
        self.trials = 0
        self.batches, self.examples = list(self.plan.scaled), self.plan.examples
        self.step_seconds = 0.0  # of the base run
        self.rest = 0  # examples from the checkpoint to the target, by the base batch, where known
        # What a checkpoint must agree with to be this run's.
        self.identity = repr(
            (
                fingerprint(self.workload),
                self.dtype,
                self.plan.optimizer,
                self.plan.scaled[self.plan.base].group,
                self.plan.base,
                self.seed,
            )
        )
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"folder '{self.folder}' cannot be made: {error.strerror}. Name another.") from None
            checkpoint.clear_leftovers(self.folder)

    def _trained(self, seed: int, scaled: Scaled) -> Trained:
        session = Session(self.workload, self.device, self.dtype, seed)
        return Trained(session, session.optimizer_of(self.plan.optimizer, scaled.group))

    def steps_to_branch_at(self, steps: Sequence[int]) -> list[int]:
        """The checkpoints of these that lie in the first half of the way to the target; where none does, one that does.

        A critical batch grows along a run: late branches say nothing of its beginning. How long the way is, a training
        of its own says, which ends at twice the steps asked for, or where its time is up: then all of them stand.
        """
        target = self.plan.target
        if target is None:
            return list(steps)
        if self.untrained <= target:
            text = f"the target of {number(target)} is met before the first step, at loss {number(self.untrained)}"
            self.asides.append(Note("critical_batch", f"{text}: branches go as low as they get. Give a lower one"))
            return list(steps)
        with seeded(self.seed, self.device):
            reached = self._steps_to(target, 2 * steps[-1])
        if reached is None or 2 * steps[-1] <= reached:
            return list(steps)
        kept = [step for step in steps if 2 * step <= reached]
        left = ", ".join(str(step) for step in steps if step not in kept)
        text = f"the base run is at the target by step {reached}"
        if kept:
            self.asides.append(Note("branches.step", f"{text}: step {left} is past half the way, and left out"))
            return kept
        early = round(_EARLY * reached)
        self.asides.append(Note("branches.step", f"{text}: it is branched from at step {early} in place of {left}"))
        self.rest = self.plan.base * (reached - early)
        return [early]

    def _steps_to(self, target: float, most: int) -> int | None:
        """Steps of the base run to a train loss, as far as looks tell; None where it is not there in time."""
        begun, scaled = time.monotonic(), self.plan.scaled[self.plan.base]
        deadline, trained = begun + _AHEAD * (self.plan.deadline - begun), self._trained(self.seed, scaled)
        look = 1
        while trained.done < most and time.monotonic() < deadline:
            self._say(f"steps to the target: {trained.done} of at most {most}", 0.0)
            trained.advance(self.plan.base, scaled.lr, min(look, most - trained.done))
            loss, look = trained.evaluate(self.held_out), min(2 * look, _LOOK)
            if not math.isfinite(loss):
                return None
            if loss <= target:
                return trained.done
        return None

    def base_to(self, step: int) -> bool:
        """Bring the base run to a step: from its checkpoint in the folder if there is one, else by training.

        False where the deadline comes first.
        """
        path = self.folder / f"step-{step}.pt" if self.folder is not None else None
        if path is not None and path.exists():
            self.state = checkpoint.load(path)
            if self.state.get("identity") != self.identity:
                raise UsageError(
                    f"checkpoint '{path}' belongs to another run (workload, options, optimizer, batch or seed "
                    "differ). Name another folder."
                )
            self._restore(self.base)
            return True
        while self.base.done < step:
            start, before = time.monotonic(), self.base.done
            if start >= self.plan.deadline:
                self.notes.append(Note("branches", f"the time budget ended before step {step}. Raise it"))
                return False
            self._say(f"base run: step {self.base.done} of {step}", len(self.found) / (len(self.found) + 1))
            rate = self.plan.scaled[self.plan.base].lr
            loss = self.base.advance(self.plan.base, rate, min(_LOOK, step - self.base.done))
            self.base.session.check_finite(loss, f"at step {self.base.done} of the base run, at rate {rate(0):g}")
            self.step_seconds = (time.monotonic() - start) / (self.base.done - before)
        session = self.base.session
        self.state = {
            "identity": self.identity,
            "step": step,
            "model": _copied(session.model.state_dict()),
            "optimizer": _copied(self.base.optimizer.state_dict()),
            "generator": session.generator.get_state(),
            "loss_scale": asdict(session.scaling) if session.scaling is not None else None,
        }
        if path is not None:
            checkpoint.save(path, self.state)
        return True

    def _aim(self, rest: int) -> None:
        """Let the base branch reach the target, so many examples off, a quarter into the window."""
        self.rest, before = rest, self.batches[-1]
        while len(self.batches) > _FEWEST and _LEAST_STEPS * math.lcm(*self.batches) > LATE * rest:
            self.batches.pop()
        self.examples = self._window(LATE * rest)
        if self.batches[-1] < before:
            self._left_out("they take few steps to the target, if they come there")

    def _window(self, examples: int) -> int:
        """As many examples or more, that make whole steps of every batch size between looks."""
        unit = WINDOW * math.lcm(*self.batches)
        return unit * max(1, math.ceil(examples / unit))

    def _shrink(self, searches: bool) -> None:
        """Shorten the window, then leave out the largest batches, until two repeats keep the deadline, and a search of
        rates before them if this checkpoint `searches` one yet.

        A step is taken to last as long as one of the base run where it is smaller, and in proportion where larger. A
        window in which the target is aimed at keeps it within its first half.
        """
        left, base = self.plan.deadline - time.monotonic(), self.plan.base

        def seconds() -> float:
            steps = 2 * sum(self.examples / batch * max(1.0, batch / base) for batch in self.batches)
            steps += _SEARCH * self.examples / base if searches else 0.0
            return steps * self.step_seconds

        kept = len(self.batches)
        while seconds() > left:
            unit = WINDOW * math.lcm(*self.batches)
            if self.examples - unit >= max(unit, 2 * self.rest):
                self.examples -= unit
            elif len(self.batches) > _FEWEST:
                self.batches.pop()
                self.examples = self._window(LATE * self.rest)
            else:
                break
        if len(self.batches) < kept:
            self._left_out("the time budget does not suffice for them")

    def _left_out(self, why: str) -> None:
        """Say it once, of the last time."""
        self.asides = [note for note in self.asides if note.figure != "branches.points"]
        self.asides.append(Note("branches.points", f"batches above {self.batches[-1]} were left out: {why}"))

    def _restore(self, trained: Trained) -> None:
        """Put the checkpoint into a model and its optimizer, whose own rate and batches stay."""
        own = [dict(group) for group in trained.optimizer.param_groups]
        trained.session.model.load_state_dict(self.state["model"])
        trained.optimizer.load_state_dict(_copied(self.state["optimizer"]))
        for group, kept in zip(trained.optimizer.param_groups, own, strict=True):
            group.update({key: value for key, value in kept.items() if key != "params"})
        if (scale := self.state.get("loss_scale")) is not None:  # of fp16: found once, by updates that were left out
            trained.session.scaling = LossScale(**scale)
        if trained is self.base:
            trained.session.generator.set_state(self.state["generator"])
            trained.done = int(self.state["step"])

    def branch(self, step: int, begin: float, share: float) -> None:
        """All branches of the checkpoint the base run stands at."""
        plan = self.plan
        if plan.shrinks:
            if self.rest:
                self._aim(self.rest)
            self._shrink(searches=plan.tunes)
        initial = self.base.evaluate(self.held_out)
        if step and not initial <= self.untrained:
            text = (
                f"the base run's loss rose from {number(self.untrained)} to {number(initial)} by step {step}, at rate "
                f"{plan.scaled[plan.base].lr(0):g}: branches of it say nothing of a run that trains. "
                "Lower the learning rate, or branch later"
            )
            self.notes.append(Note("branches", text))
        scaled, tuned = self._tuned(step, initial, begin) if plan.tunes else (plan.scaled, False)
        losses: Losses = {batch: [] for batch in self.batches}
        count, late = plan.seeds * len(self.batches), False
        for repeat in range(plan.seeds):
            for i, batch in enumerate(self.batches):
                done = (repeat * len(self.batches) + i) / count
                self._say(f"branches at step {step}: batch {batch}, repeat {repeat + 1}", begin + share * done)
                found = self._one(batch, repeat, initial, scaled[batch]) if not late else None
                if late := found is None:
                    break
                losses[batch].append(found)
                self.trials += 1
        rates = {batch: own.lr(10**9) for batch, own in scaled.items()}
        summary = branch_summary.summarize(step, plan.base, self.examples, rates, losses, plan.tolerance, plan.target)
        self.found.append(replace(summary, tuned=tuned))
        if late:
            repeats = min(len(rows) for rows in losses.values())
            text = f"{repeats} of {plan.seeds} repeats of all batches at step {step} within the time budget. Raise it"
            self.notes.append(Note("branches", text))

    def _tuned(self, step: int, initial: float, share: float) -> tuple[dict[int, Scaled], bool]:
        """What the batch sizes train with at the rate that lowers the base batch's loss most in half a window.

        Rates a factor of 2 apart around the one in use; where the best is the last one tried, further ones. Whether
        the search came to its end before the deadline.
        """
        plan, losses, curves = self.plan, dict[int, float](), dict[int, Array]()
        usual = plan.scaled[plan.base].lr(10**9)

        def loss(power: int) -> float | None:
            self._say(f"rates at step {step}: {usual * 2.0**power:g}", share)
            own = rated(plan.group, plan.rule, usual * 2.0**power, plan.base, [plan.base])[plan.base]
            found = self._one(plan.base, 0, initial, own, WINDOW // 2)
            if found is None:
                return None
            curves[power] = found
            return float(np.nan_to_num(np.median(found[-3:]), nan=np.inf))

        wanted = [0, 1, -1, 2, -2]
        while wanted:
            power = wanted.pop(0)
            if (found := loss(power)) is None:
                text = f"the time budget ended before a rate was found at step {step}: branches at the rate in use"
                self.asides.append(Note("branches.learning_rate", text))
                return plan.scaled, False
            losses[power] = found
            best = min(losses, key=losses.__getitem__)
            if not wanted and abs(best) == max(abs(p) for p in losses if p * best >= 0) and abs(best) < _FURTHEST:
                wanted.append(best + (1 if best > 0 else -1))
        best = min(losses, key=losses.__getitem__)
        if abs(best) == _FURTHEST:
            text = f"the best rate at step {step} is the last one tried, {usual * 2.0**best:g}: give --lr near it"
            self.asides.append(Note("branches.learning_rate", text))
        if plan.shrinks and (rest := self._examples_to_target(curves[best])):  # at this rate it may be nearer
            self._aim(rest)
            self._shrink(searches=False)
        return rated(plan.group, plan.rule, usual * 2.0**best, plan.base, list(plan.scaled)), abs(best) < _FURTHEST

    def _examples_to_target(self, losses: Array) -> int:
        """Examples that a branch took to the target, by a line between looks; 0 where it is not there."""
        target = self.plan.target
        if target is None or not losses[0] > target or not (there := np.flatnonzero(losses <= target)).size:
            return 0
        look = int(there[0])
        above, below = float(losses[look - 1]), float(losses[look])
        return math.ceil((look - (target - below) / (above - below)) * self.examples / WINDOW)

    def _one(self, batch: int, repeat: int, initial: float, scaled: Scaled, looks: int = WINDOW) -> Array | None:
        """Losses [looks + 1] of one branch, at equal numbers of examples; nan from where it diverged.

        None where the deadline came first.
        """
        found = np.full(looks + 1, np.nan)
        found[0] = initial
        seed = self.seed + 1 + repeat
        with seeded(seed, self.device):  # dropout: the base run's own goes on as if it had not branched
            trained = self._trained(seed, scaled)
            self._restore(trained)
            for look in range(1, looks + 1):
                if time.monotonic() >= self.plan.deadline:
                    return None
                trained.advance(batch, scaled.lr, self.examples // (WINDOW * batch))
                loss = trained.evaluate(self.held_out)
                if not math.isfinite(loss):
                    break
                found[look] = loss
        return found

    def _say(self, what: str, share: float) -> None:
        if self.progress is not None:
            self.progress(what, min(1.0, share))

    def result(self, complete: bool = True) -> Convergence:
        """The record so far."""
        plan = self.plan
        lr = plan.scaled[plan.base].lr(10**9)
        own = {p.learning_rate for at in self.found if at.tuned for p in at.points if p.batch == plan.base}
        tuned = (
            f"; branches at {', '.join(f'{rate:g}' for rate in sorted(own))}, tuned at the checkpoint" if own else ""
        )
        text = f"base rate {lr:g}{tuned}, other batches by the rule '{plan.rule}'"
        return Convergence(
            curves=(),
            notes=(*self.notes, *self.asides, Note("branches.learning_rate", text)),
            optimizer=public(plan.optimizer, self.base.optimizer),
            seeds=plan.seeds,
            trials=self.trials,
            base_batch=plan.base,
            smoothing=f"train loss of {self.workload.evaluation_examples} fixed examples, "
            f"smoothed over five looks, {WINDOW} a branch",
            complete=complete and not self.notes,
            branches=tuple(self.found),
            target=plan.target if plan.target is not None and plan.target < self.untrained else None,
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
