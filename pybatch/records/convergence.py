"""Records of steps to a target against batch size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pybatch.base import numerals as n
from pybatch.base.codec import TOP
from pybatch.base.display import Shown
from pybatch.records.figure import Figure, figure
from pybatch.records.subject import Device, Note, WorkloadInfo

PointStatus = Literal["reached", "not_reached", "diverged", "not_run"]  # not_run: of one seed at one rate only


def _examples(point: ConvergencePoint, _: object) -> float | None:
    return point.steps * point.batch if point.steps else None


def _rate(point: ConvergencePoint, _: object) -> str:
    return n.number(point.learning_rate) + (" (edge)" if point.edge else "")


@dataclass(frozen=True)
class RateSteps:
    """Steps to one target at one batch size and one learning rate, seed by seed."""

    learning_rate: float
    steps: tuple[float | None, ...]  # by seed; None where the status is not reached
    statuses: tuple[PointStatus, ...]  # by seed


@dataclass(frozen=True)
class ConvergencePoint:
    """Steps to one target at one batch size, over seeds, at the learning rate the rule gives or the best one tried."""

    batch: int = field(
        metadata=figure("batch", form=n.count, before=(Figure("rule", form=n.plain, of=lambda p, curve: curve.rule),))
    )
    # Median over seeds, an unreached target counting as infinite.
    steps: float | None = field(
        metadata=figure("steps", form=n.rounded, beside=(Figure("{examples}", form=n.count, of=_examples),))
    )
    status: PointStatus = field(metadata=figure("status", form=n.words))
    seeds: int
    learning_rate: float | None = field(metadata=figure("learning rate", form=n.plain, of=_rate))
    steps_before: float | None = None  # median of the last evaluations above the target: steps lie between the two
    reached: int = field(  # seeds that reached the target
        default=0,
        metadata=figure(
            "runs",
            form=n.plain,
            of=lambda p, _: f"{p.reached} of {p.runs}",
            beside=(Figure("regime", form=n.plain, of=lambda p, curve: dict(curve.regimes).get(p.batch)),),
        ),
    )
    diverged: int = 0  # seeds whose loss became NaN, infinite, or over three times the initial one
    edge: bool = False  # the best rate is the lowest or highest one tried: a better one may lie beyond
    rates: tuple[RateSteps, ...] = ()  # every rate tried, ascending
    other_losses: tuple[float | None, ...] = ()  # by seed: the other split's smoothed loss where the target was met
    test_losses_at_epochs: tuple[float | None, ...] = ()  # by seed: smoothed, after the sweep's gap_epochs
    test_losses_at_steps: tuple[float | None, ...] = ()  # by seed: smoothed, after the sweep's gap_steps
    train_losses_at_epochs: tuple[float | None, ...] = ()  # likewise: beside a test loss, how far the run was trained
    train_losses_at_steps: tuple[float | None, ...] = ()

    @property
    def runs(self) -> int:
        """The runs that `reached` counts among: the seeds, or where no rate is chosen all runs made."""
        if self.learning_rate is not None or not self.rates:
            return self.seeds
        return sum(status != "not_run" for rate in self.rates for status in rate.statuses)


def _regimes(found: tuple[tuple[int, str], ...]) -> str:
    return ", ".join(f"{batch}: {regime}" for batch, regime in found)


@dataclass(frozen=True)
class StepsFit(Shown):
    """Steps to target against batch size: a fitted model with its critical batches. Intervals are 95 %.

    A bound of None is open. Where no batch tested bends the curve, `critical_batch` is None and `low` bounds it; where
    steps do not fall at all, `high` does.
    """

    model: str | None  # None: too few batches reached the target for a fit
    s_min: float | None  # fewest steps, however large the batch
    critical_batch: float | None  # B_50: twice the fewest examples
    low: float | None
    high: float | None
    b20: float | None  # 1.2 times the fewest examples of the curve; beside it stands `b20_zhang`
    b50: float | None
    b_stag: float | None  # doubling it saves less than 10 % of the steps
    s_min_low: float | None = None
    s_min_high: float | None = None
    b20_low: float | None = None
    b20_high: float | None = None
    b_stag_low: float | None = None
    b_stag_high: float | None = None
    # The critical batch of Zhang et al. 2024: 1.2 times the examples of the smallest batch tested, B_0, which is
    # 0.2 B_c + 1.2 B_0 on the hyperbola.
    b20_zhang: float | None = None
    b20_zhang_low: float | None = None
    b20_zhang_high: float | None = None
    # The batch of the fewest examples, of those from the smallest to the largest tested; None where all take as many.
    # An end of None is beyond those tested.
    b_min: float | None = None
    b_min_low: float | None = None
    b_min_high: float | None = None
    # By the model: superlinear (smaller batches cost far more examples), linear, diminishing, stagnant, undetermined.
    regimes: tuple[tuple[int, str], ...] = field(default=(), metadata=figure("regimes", form=_regimes))
    # From the steps saved by doubling, without a model.
    measured_regimes: tuple[tuple[int, str], ...] = field(
        default=(), metadata=figure("measured regimes", form=_regimes)
    )
    parameters: dict[str, float] = field(default_factory=dict)  # of the model, see `steps_model`
    # AICc of every model tried (of up to 8 runs AIC), above the least.
    candidates: dict[str, float] = field(default_factory=dict)
    rms_log_error: float | None = None  # root mean square of ln(measured / fitted) over the cells that reached
    batches: int = 0  # batch sizes that reached the target
    seeds: int = 0  # runs of the batch size that has the most
    notes: tuple[Note, ...] = ()


def aim_of(split: str) -> str:
    """What a target is of, in words: "train loss" of "train", "test accuracy" of "test:accuracy"."""
    where, _, metric = split.partition(":")
    return f"{where} {metric or 'loss'}"


@dataclass(frozen=True)
class Curve:
    """Steps to target against batch size for one learning-rate rule and one split."""

    rule: str
    split: str  # "train" or "test", of a loss; "test:accuracy" of a metric
    points: tuple[ConvergencePoint, ...]
    s_min: float | None
    critical_batch: float | None = field(  # B_50: twice the fewest examples
        metadata=figure("critical batch", "{examples}", interval=("low", "high"))
    )
    low: float | None
    high: float | None
    target: float | None = None
    regimes: tuple[tuple[int, str], ...] = ()
    fit: StepsFit | None = None
    cap: int | None = None  # steps after which a trial of this curve was given up, where all batches share one
    noise_ratio: float | None = field(  # B_simple over this critical batch
        default=None, metadata=figure("B_simple over it", interval=("noise_ratio_low", "noise_ratio_high"))
    )
    noise_ratio_low: float | None = None
    noise_ratio_high: float | None = None
    notes: tuple[Note, ...] = ()
    # The batch of the fewest examples by the fit, of those tested; an end of None is beyond those tested.
    b_min: float | None = field(
        default=None, metadata=figure("fewest examples", "{examples}", interval=("b_min_low", "b_min_high"))
    )
    b_min_low: float | None = None
    b_min_high: float | None = None
    higher: bool = False  # of a metric: whether that is better, and the target is reached from below


@dataclass(frozen=True)
class BranchPoint:
    """Branches of one batch size from one checkpoint, repeat by repeat; None where the loss became NaN or infinite."""

    batch: int
    learning_rate: float
    losses: tuple[float | None, ...]  # smoothed, at the end of the window
    steps: tuple[float | None, ...]  # to the level; None too where it was not reached in the window


def _largest(at: Branching, _: object) -> str:
    return f"{n.count(at.largest)} {n.interval(at.largest_low, at.largest_high, n.count)}".strip()


@dataclass(frozen=True)
class Branching:
    """The critical batch at one point of a run, from branches that take the same examples in other batch sizes."""

    step: int = field(metadata=figure("step", form=n.count))  # of the base run
    loss: float | None = field(metadata=figure("loss"))  # train loss at the checkpoint
    base_batch: int
    window: int  # examples each branch is trained on
    # Train loss whose steps are counted: the target, or that of the base branch a quarter into the window.
    level: float | None
    tolerance: float  # share of the base branch's last loss
    points: tuple[BranchPoint, ...]
    # The largest batch whose last loss is within the tolerance of the base branch's.
    largest: int | None = field(
        metadata=figure(
            "within tolerance",
            form=n.plain,
            of=_largest,
            before=(
                Figure("critical batch", of=lambda at, _: at.fit and at.fit.critical_batch),
                Figure("95 %", form=n.plain, of=lambda at, _: n.interval(at.fit.low, at.fit.high) if at.fit else ""),
            ),
        )
    )
    largest_low: int | None
    largest_high: int | None  # None: the largest batch tested is within it
    fit: StepsFit | None = None  # of the steps to the level: the critical batch here
    notes: tuple[Note, ...] = ()
    tuned: bool = False  # rates were searched at the checkpoint, not carried over


@dataclass(frozen=True)
class Convergence(Shown):
    """Steps to target against batch size, measured by training."""

    curves: tuple[Curve, ...]
    notes: tuple[Note, ...] = ()
    optimizer: str | None = None
    seeds: int | None = None
    trials: int | None = None  # training runs behind the curves
    base_batch: int | None = None  # B_0, whose rate the fixed rules start from
    base_rate: float | None = None  # that rate, where it was given; None: the one tuned at the base batch
    smoothing: str | None = None  # how the train loss was smoothed, and on what the test loss was taken
    complete: bool = True  # False: stopped before every trial had run
    branches: tuple[Branching, ...] = ()  # along one run, by step
    target: float | None = None  # train loss that the run branched from was to reach; of a sweep see its curves
    gap_epochs: float | None = None  # after which test losses of all batch sizes are compared
    optimizer_options: dict[str, str] = field(default_factory=dict)  # that were given: {"betas": "0.9/0.95"}
    schedule: str | None = None  # "constant", "cosine", "wsd", "average", "own"; None: of logs, or not a sweep's
    following: dict[str, str] = field(default_factory=dict)  # the batch size, beside the rate: {"beta2": "half-life"}
    gap_steps: int | None = None  # likewise: those that the largest batch takes in the epochs
    experiment: str | None = None  # its name in its store: two records of one name are states of the same sweep
    pooled: tuple[str, ...] = ()  # names of the experiments whose seeds are pooled in it
    changed: str | None = None  # ISO 8601, UTC: when that store last learned something of it
    device: Device | None = field(default=None, metadata=TOP)
    workload: WorkloadInfo | None = field(default=None, metadata=TOP)
