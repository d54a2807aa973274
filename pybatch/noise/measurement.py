"""The gradient noise scale of a workload from micro-batches, along a stretch of training after a short warm-up.

Each group of k micro-batches gives one pair of squared norms: of the micro-batches' gradients, and of their mean
(McCandlish et al. 2018, appendix A.1). A training step follows each group: |G|^2 changes tenfold within ten steps, so
that a scale at one point says little of the run. Both norms come from the fused optimizer's own pass, here with a
learning rate of 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch

from pybatch.base.arguments import typed
from pybatch.base.errors import Interrupted, UsageError, unknown
from pybatch.base.numerals import counted, number
from pybatch.base.progress import told
from pybatch.device.disturbance import threads_left
from pybatch.device.generators import seeded
from pybatch.device.identity import resolve
from pybatch.fits.noise import INTERRUPTED, noiseless
from pybatch.noise.confounds import confounds
from pybatch.noise.coupling import coupling
from pybatch.noise.feeds import Feed, HookFeed, OptimizerFeed
from pybatch.noise.groups import MicroBatchGroups
from pybatch.noise.hessian import HessianNoise
from pybatch.records import NoiseScale, Note, WeightedNoise
from pybatch.workloads.base import Progress, Workload, checked
from pybatch.workloads.running.optimizers import rate_of
from pybatch.workloads.running.session import Session

NoiseSource = Literal["micro-batches", "per-example"]
Mode = Literal["train", "eval", "both"]

WARMUP_STEPS = 200  # past the first fall of the loss, where the noise scale is least like later training
STRETCH_STEPS = 400  # of training while measuring: twice the warm-up, as the scale grows where the loss falls further
WARMUP_SHARE = 0.4  # of the time budget; slower workloads warm up for fewer steps, and the record says so
ROSE = 3.0  # times the loss before training: a warm-up that is above it has diverged
CHECK_STEPS = 25  # training steps between looks at the loss, each of which waits for the device
FIRST_GROUP = 4  # micro-batches per group to begin with
GROUPS = 32  # the least groups a final answer rests on: one block each in the estimator's interval
LARGEST_CURVATURE_GROUP = 64  # micro-batches per gradient: past it, more pairs do as well as larger ones
WIDTH = 0.15  # relative half width of the interval at which measuring stops; it moves the best batch by 7 %


@told
@typed
def measure_noise(
    workload: Workload,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    seed: int = 0,
    time_budget: float = 25.0,
    warmup_steps: int | None = None,
    micro_batch: int | None = None,
    source: NoiseSource = "micro-batches",
    mode: Mode = "train",
    hold: bool | None = None,
    layers: bool = False,
    preconditioned: bool = False,
    hessian: bool = False,
    progress: Progress | None = None,
) -> NoiseScale:
    """Train shortly, and measure B_simple along the steps that follow until its interval is narrow or time is up.

    The warm-up uses the workload's optimizer and schedule, else pybatch's AdamW at its `learning_rate`, and its
    `reference_batch`. A pilot with small groups
    then finds the scale's size; the measurement proper uses groups about as large, which resolve it soonest. After
    each group training goes on by one step: the scale is the ratio of the means over this stretch, and its interval
    holds the changes along it.

    Args:
        workload: what to measure.
        device: "cpu", "cuda:1", or None for GPU 0 if there is one, else the CPU.
        dtype: "fp32", "bf16" or "fp16" (autocast over fp32 parameters).
        seed: of the model, the data order and dropout.
        time_budget: seconds, warm-up included.
        warmup_steps: training steps before; None: 200, or as many as fit in 40 % of the budget. A number is kept to.
        micro_batch: examples per micro-batch; None: the workload's `reference_batch`. The estimate does not depend on
            it, its cost does.
        source: "micro-batches", which holds for any model; or "per-example", exact norms of every example's gradient,
            which resolve the scale with fewer examples: in one pass where every layer has a rule for it
            (`per_example.ExampleRecorder`), else one example at a time; BatchNorm in training is refused.
        mode: "train": the model as in training, dropout's noise included; "eval": in evaluation mode; "both": the
            first, and the second as `eval_mode`. Training is always in training mode.
        hold: True: no training between groups, and the scale is that of one point of the run; None: held only where
            `warmup_steps` is 0.
        layers: every parameter's own noise scale too, as `layers`.
        preconditioned: tr(P Sigma) / (G^T P G) with the P of the warm-up's AdamW too, as `preconditioned`.
        hessian: B_noise = tr(H Sigma) / (G^T H G) too, as `hessian`; the time budget is shared evenly.
        progress: called with (what is being done, share done); None: a line on stderr, on a terminal or in a notebook.

    Returns:
        The noise scale in examples, with `warmup_steps`, `loss` (training loss where it was measured) and notes on what
        confounds it. Where the workload has `example_weights`, micro-batches count by them and `counted` is the scale
        in their unit.

    Raises:
        UsageError: an argument out of range. WorkloadError: the workload fails, or its loss is not finite.
        Interrupted: on Ctrl-C, `partial` holding the NoiseScale so far, or None.
    """
    checked(workload)
    if not (time_budget > 0 and math.isfinite(time_budget)):
        raise UsageError(f"time_budget {time_budget} leaves no time to measure the noise scale. Give seconds above 0.")
    if warmup_steps is not None and warmup_steps < 0:
        raise UsageError(f"warmup_steps {warmup_steps} is negative. Give 0 or more training steps.")
    if micro_batch is not None and micro_batch < 1:
        raise UsageError(f"micro_batch {micro_batch} holds no example. Give 1 or more.")
    if source not in get_args(NoiseSource):
        raise unknown("source", source, get_args(NoiseSource))
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    if dtype == "fp16" and (hessian or source == "per-example"):
        raise UsageError("fp16: per-example norms and the Hessian know no loss scale. Use bf16, or micro-batches.")
    if preconditioned and source != "micro-batches":
        raise UsageError("preconditioned=True: per-example norms come without a preconditioner. Use micro-batches.")
    place = resolve(device)
    with seeded(seed, place), threads_left(place):
        run = _Measurement(workload, place, dtype, seed, time_budget, progress, source, layers, preconditioned)
        run.held = warmup_steps == 0 if hold is None else hold
        try:
            run.warm_up(warmup_steps)
            run.notes += coupling(run.session)
            run.measure_all(micro_batch or max(1, workload.reference_batch), mode, hessian)
        except KeyboardInterrupt:
            found = run.result(INTERRUPTED) if run.measured else None
            raise Interrupted(found) from None
        return run.result()


class _Measurement:
    """One call of `measure_noise`: the session, the clock, and the best answer so far."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        dtype: str,
        seed: int,
        time_budget: float,
        progress: Progress | None,
        source: NoiseSource,
        layers: bool,
        preconditioned: bool,
    ) -> None:
        self.budget, self.start, self.progress = time_budget, time.monotonic(), progress
        self.session = Session(workload, device, dtype, seed)
        self.workload, self.source = workload, source
        self.optimizer = self.session.optimizer()  # of the warm-up
        self.schedule = self.session.schedule(self.optimizer, workload.steps)
        self.feed: Callable[[], Feed] = partial(OptimizerFeed, self.session.model, layers)
        self.feeding: Feed | None = None
        if preconditioned:
            self.feed = partial(HookFeed, self.session.model, self.optimizer, layers)
        if source == "per-example":
            from pybatch.noise.per_example.formed import fastest  # only where wanted: it brings Triton in

            self.feed = fastest(self.session, layers)
        self.warmup_steps = self.stretch_steps = 0
        self.untrained: float | None = None  # loss of the first batch
        self.stretch_end = STRETCH_STEPS
        self.held = False
        self.rounds: list[MicroBatchGroups] = []
        self.deadline = self.start + time_budget  # of the part under way
        self.eval_mode: NoiseScale | None = None
        self.hessian: HessianNoise | None = None
        self.mode: Mode = "train"
        self.notes: list[Note] = []

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, min(1.0, (time.monotonic() - self.start) / self.budget))

    def warm_up(self, steps: int | None) -> None:
        """Train; leaves the model where the noise is measured."""
        wanted, work = WARMUP_STEPS if steps is None else steps, self.workload
        deadline = self.start + WARMUP_SHARE * self.budget if steps is None else math.inf
        optimizer = self.optimizer
        for step in range(wanted):
            if step % CHECK_STEPS == 0:
                self.say("warm-up training")
            if time.monotonic() >= deadline:
                text = f"{step} of {wanted} steps, to keep within the time budget: the scale usually grows in training"
                self.notes.append(Note("noise.warmup_steps", text))
                break
            optimizer.zero_grad()
            loss = self.session.backward(self.session.batch(work.reference_batch))
            if step % CHECK_STEPS == 0 or step == wanted - 1:
                rate = rate_of(optimizer)
                at = f"in training step {step + 1} at learning rate {rate:g}"
                value = self.session.check_finite(loss, at)
                self.untrained = value if self.untrained is None else self.untrained
            self.step()
            self.warmup_steps = step + 1
        optimizer.zero_grad()

    def step(self) -> None:
        """One update, and what the workload's schedule makes of the rate."""
        if self.session.update(self.optimizer) and self.schedule is not None:
            self.schedule.step()

    def train_on(self) -> None:
        """One more training step, between groups."""
        assert self.feeding is not None
        training, n = self.session.model.training, self.workload.reference_batch
        self.session.model.train()
        self.optimizer.zero_grad()
        batch = self.session.batch(n)
        self.feeding.outside(lambda: self.session.backward(batch), n)
        self.step()
        self.optimizer.zero_grad()
        self.session.model.train(training)
        self.stretch_steps += 1

    def measure_all(self, micro_batch: int, mode: Mode, hessian: bool) -> None:
        """What was asked for, in even shares of the time that is left."""
        self.mode, end = mode, self.start + self.budget
        parts = 1 + (mode == "both") + hessian
        self.session.model.train(mode != "eval")

        def share(of: int) -> None:
            now = time.monotonic()
            self.deadline = now + (end - now) / of if of > 1 else end

        share(parts)
        if mode == "both":
            self.session.model.eval()
            self.measure(micro_batch)
            self.eval_mode, self.rounds = self._best(), []
            self.session.model.train()
            share(parts - 1)
        self.measure(micro_batch)
        if hessian:
            found = self._best()
            size = found.b_simple or found.low or micro_batch
            k = min(max(1, round(size / 2 / micro_batch)), LARGEST_CURVATURE_GROUP)
            self.deadline = end
            self.end_feed()
            self.hessian = HessianNoise(self.session, micro_batch, k)
            self.hessian.run(end, WIDTH, self.say)

    def new_feed(self) -> Feed:
        """A feed for one round, in place of the one before."""
        self.end_feed()
        self.feeding = self.feed()
        return self.feeding

    def end_feed(self) -> None:
        """Let no feed see the passes that follow."""
        if self.feeding is not None:
            self.feeding.end()
            self.feeding = None

    def measure(self, micro_batch: int) -> None:
        """Rounds of growing groups until groups are as large as the scale, then more groups until it is narrow."""
        k, self.stretch_end = FIRST_GROUP, self.stretch_steps + STRETCH_STEPS
        while True:
            between = None if self.held else self.train_on
            current = MicroBatchGroups(self.session, micro_batch, k, self.new_feed(), between)
            self.rounds.append(current)
            if not self._fill(current, GROUPS):
                return
            found = current.result()
            if _still(found):
                return
            wanted = self._group_for(found, micro_batch, k)
            affordable = int(self.left * k / (GROUPS * max(current.group_seconds, 1e-9)))
            larger = min(wanted, affordable)
            if relative_width(found) <= WIDTH or larger < 2 * k:
                break
            k = larger
        while relative_width(found) > WIDTH:
            # Variance falls with the number of groups; look seldom, because stopping on a look costs coverage.
            factor = (relative_width(found) / WIDTH) ** 2 * 1.1 if found.status == "resolved" else 2.0
            if not self._fill(current, math.ceil(current.groups * min(max(factor, 1.25), 4.0))):
                return
            found = current.result()

    def _fill(self, current: MicroBatchGroups, groups: int) -> bool:
        while current.groups < groups:
            self.say("measuring gradients")
            some = min(groups, current.groups + max(1, GROUPS // 4))
            if not self.held:
                some = min(some, current.groups + self.stretch_end - self.stretch_steps)
            if some == current.groups or not current.run(some, self.deadline):
                return False
        return True

    @staticmethod
    def _group_for(found: NoiseScale, micro_batch: int, k: int) -> int:
        """Micro-batches per group that make it about B_simple examples; four times as many where that is not known."""
        if found.status == "resolved" and found.b_simple is not None:
            return math.ceil(found.b_simple / micro_batch)
        return 4 * k

    @property
    def measured(self) -> bool:
        """Whether there is at least one pair of norms."""
        return any(current.groups for current in self.rounds)

    def _best(self) -> NoiseScale:
        """The best-resolved round."""
        nothing = Note("noise.b_simple", "the time budget ended before the first group of micro-batches")
        # The last round has the largest groups; an earlier one counts only where the last was cut off too early.
        return min(
            (current.result() for current in reversed(self.rounds) if current.groups),
            key=lambda n: (_RANK[n.status], relative_width(n)),
            default=NoiseScale(None, None, None, None, None, "unresolved", self.source, 0, notes=(nothing,)),
        )

    def result(self, why: str | None = None) -> NoiseScale:
        """The best-resolved round, with what a reader must know of it."""
        found = self._best()
        ended = not self.held and self.stretch_steps >= self.stretch_end
        notes = list(found.notes) + self.notes
        if relative_width(found) > WIDTH and (found.status == "resolved" or why == INTERRUPTED):
            text = f"{why or 'the time budget ended before the interval was narrow'}; a longer one narrows it"
            if ended and not why:
                text = f"the interval holds how the gradient changed over {STRETCH_STEPS} training steps, the most made"
            notes.append(Note("noise.low", text))
        if found.skipped:
            text = f"left out: {counted(found.skipped, 'group')} with a gradient that is not finite"
            notes.append(Note("noise.skipped", text))
        first = self.untrained
        if first is not None and found.loss is not None and found.loss > first + (ROSE - 1) * abs(first):
            text = (
                f"the warm-up diverged: training loss {number(found.loss)} where it was {number(first)} before, so the "
            )
            text += f"scale predicts no critical batch. Give a learning rate below {rate_of(self.optimizer):g}"
            notes.append(Note("noise.loss", text))
        notes += confounds(self.session.model, self.workload.examples, found, training=self.mode != "eval")
        if self.mode == "eval":
            notes.append(Note("noise.b_simple", "measured in evaluation mode: without the noise of dropout"))
        if self.hessian is not None:
            doubt = self.hessian.result.reason
            notes += [Note("noise.hessian", doubt)] if doubt else []
        return dataclasses.replace(
            found,
            warmup_steps=self.warmup_steps,
            stretch_steps=self.stretch_steps,
            learning_rate=self.session.info.learning_rate,
            notes=tuple(dict.fromkeys(notes)),
            eval_mode=None if self.eval_mode is None else as_weighted(self.eval_mode),
            hessian=None if self.hessian is None else self.hessian.result,
        )


def _still(found: NoiseScale) -> bool:
    """Whether there is nothing to resolve: zero or equal gradients, which more of them won't change."""
    if not found.grad_sq or found.trace is None:
        return found.grad_sq == 0.0
    return noiseless(abs(found.trace / found.grad_sq), found.small_batch)


def as_weighted(noise: NoiseScale) -> WeightedNoise:
    """The figures of a noise scale alone."""
    why = next((note.text for note in noise.notes if note.figure == "noise.b_simple"), None)
    return WeightedNoise(
        noise.b_simple, noise.low, noise.high, noise.grad_sq, noise.trace, noise.status, noise.steps, why
    )


_RANK = {"resolved": 0, "lower_bound": 1, "unresolved": 2}


def relative_width(noise: NoiseScale) -> float:
    """Half width of the 95 % interval over the estimate; infinite where there is no bounded interval."""
    if noise.status != "resolved" or noise.b_simple is None or noise.low is None or noise.high is None:
        return math.inf
    if noise.b_simple == 0:
        return math.inf
    return (noise.high - noise.low) / 2 / noise.b_simple
