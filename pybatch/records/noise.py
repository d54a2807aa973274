"""Records of the gradient noise scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pybatch.base import numerals as n
from pybatch.base.display import Shown
from pybatch.base.errors import UsageError
from pybatch.records.figure import figure
from pybatch.records.subject import Note

_NORMAL = 1.959964  # 97.5 % point of the normal distribution

NoiseStatus = Literal["resolved", "lower_bound", "unresolved"]


@dataclass(frozen=True)
class LayerNoise:
    """Gradient noise scale of one parameter tensor, or of one group of them that is communicated together."""

    name: str = field(metadata=figure("layer", form=n.plain))
    b_simple: float | None = field(metadata=figure("B_simple"))
    grad_sq: float | None  # unclamped means, as in NoiseScale
    trace: float | None
    low: float | None = field(default=None, metadata=figure("low"))
    high: float | None = field(default=None, metadata=figure("high"))
    status: NoiseStatus = field(default="unresolved", metadata=figure("status", form=n.words))
    steps: int = 0  # pairs of norms that entered
    reason: str | None = None  # why there is no number, or what to know of it


@dataclass(frozen=True)
class WeightedNoise:
    """tr(A Sigma) / (G^T A G) with its 95 % interval; the field it stands in says which matrix A is."""

    b_noise: float | None
    low: float | None
    high: float | None
    grad_sq: float | None  # G^T A G, unclamped mean
    trace: float | None  # tr(A Sigma), unclamped mean
    status: NoiseStatus
    steps: int  # pairs of norms that entered
    reason: str | None = None

    def in_examples(self, per_example: float, error: float = 0.0) -> WeightedNoise:
        """As NoiseScale.in_examples."""
        low, high = _ends(self.b_noise, self.low, self.high, per_example, error)
        return dataclasses.replace(
            self, b_noise=_over(self.b_noise, per_example), low=low, high=high, trace=_over(self.trace, per_example)
        )


@dataclass(frozen=True)
class CountedNoise:
    """The same B_simple counted in parts of an example, such as the tokens that its loss is a mean over.

    It holds for examples of this many parts: parts of one example are not independent draws.
    """

    unit: str  # "tokens", ...
    per_example: float  # mean of the examples that were drawn
    b_simple: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class NoisePoint:
    """The gradient noise scale over a stretch of a training run."""

    # Training steps the pairs come from, both included.
    first_step: int = field(
        metadata=figure("steps", form=n.plain, of=lambda p, _: f"{n.count(p.first_step)} to {n.count(p.last_step)}")
    )
    last_step: int = field(metadata=figure("last step", form=n.count, within="first_step"))
    b_simple: float | None = field(metadata=figure("B_simple"))
    low: float | None = field(metadata=figure("low"))
    high: float | None = field(metadata=figure("high"))
    grad_sq: float | None
    trace: float | None
    status: NoiseStatus = field(metadata=figure("status", form=n.words))
    steps: int  # pairs of norms that entered
    loss: float | None = field(default=None, metadata=figure("loss"))  # mean of what was given for these steps
    reason: str | None = None


@dataclass(frozen=True)
class NoiseScale(Shown):
    """Gradient noise scale B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, eq. 2.9), in examples, or in `unit`.

    `resolved`: `low` and `high` bound it at 95 %. `lower_bound`: |G|^2 is not separated from zero, only `low` is
    known. `unresolved`: neither is. `grad_sq` and `trace` are the unclamped means and may be negative.
    """

    b_simple: float | None = field(metadata=figure("B_simple", "{examples}", interval=("low", "high"), always=True))
    low: float | None = field(metadata=figure("low", within="b_simple"))
    high: float | None = field(metadata=figure("high", within="b_simple"))
    grad_sq: float | None
    trace: float | None
    status: NoiseStatus
    source: str  # "micro-batches", ...
    steps: int  # pairs of norms that entered
    small_batch: float | None = None
    large_batch: float | None = None
    skipped: int = 0  # steps left out for a non-finite gradient
    warmup_steps: int | None = None  # training steps before the measurement
    loss: float | None = None  # training loss where it was measured
    stretch_steps: int | None = None  # training steps made while measuring, from `warmup_steps` on; 0: none
    learning_rate: float | None = None  # of the warm-up training
    preconditioned: WeightedNoise | None = None  # experimental: A = 1 / (sqrt(v) + eps) of Adam
    layers: tuple[LayerNoise, ...] = ()
    notes: tuple[Note, ...] = ()
    hessian: WeightedNoise | None = None  # B_noise: A the Hessian of the loss (McCandlish et al. 2018, eq. 2.8)
    eval_mode: WeightedNoise | None = None  # A = 1, the model in evaluation mode: no dropout
    unit: str | None = None  # "tokens" where every figure here is counted in them; None: in examples
    counted: CountedNoise | None = None  # figures in examples that were counted in parts of them: those too
    # Of a training run that is watched: the steps its figures are of, from 1 on among those that were measured, both
    # included. They are the newest stretch that gives an interval.
    first_step: int | None = None
    last_step: int | None = None
    trajectory: tuple[NoisePoint, ...] = ()  # the whole run up to there

    def __str__(self) -> str:
        """The figure with its interval, and what it is of; `repr` has every field."""
        steps = f", steps {n.count(self.first_step)} to {n.count(self.last_step)}" if self.first_step else ""
        value = "not known, in" if self.b_simple is None else n.number(self.b_simple)
        found = " ".join(filter(None, ("B_simple", value, n.interval(self.low, self.high), self.unit or "examples")))
        why = next((note.text for note in self.notes if note.figure == "noise.b_simple"), "")
        lacking = f": {why}" if self.b_simple is None and why else ""
        return f"{found} ({n.words(self.status)}, by {self.source}{steps}){lacking}"

    @property
    def misled(self) -> str | None:
        """Why the scale predicts no critical batch: a loss that is no mean over examples, a training that diverged."""
        return next((note.text for note in self.notes if note.figure == "noise.loss"), None)

    def until(self, steps: int) -> NoiseScale:
        """The same, of a run that ended after so many steps: the last pair stands for as many as there were."""
        parts = tuple(
            dataclasses.replace(p, last_step=max(p.first_step, min(p.last_step, steps))) for p in self.trajectory
        )
        last = max(self.first_step or 1, min(self.last_step, steps)) if self.last_step is not None else None
        return dataclasses.replace(self, last_step=last, trajectory=parts)

    def in_examples(self, per_example: float, error: float = 0.0) -> NoiseScale:
        """The same in examples, the unit of the batch size, where it is counted in parts of them such as tokens.

        With |u_i|^2 the squared deviation of example i's summed gradient and T_i its tokens, the mean over the tokens
        of n examples has the noise E|u|^2 / (n E[T]^2): E[T] times as many tokens are as noisy as examples.

        Args:
            per_example: mean tokens per example; the batch size compared with is in examples.
            error: its relative standard error, which widens the interval.

        Raises:
            UsageError: the figures are in examples already, or `per_example` is not above 0.
        """
        if self.unit is None:
            raise UsageError("in_examples(): this noise scale is in examples already. Use it as it is.")
        if not (per_example > 0 and math.isfinite(per_example)):
            raise UsageError(f"in_examples({per_example}): give the mean {self.unit} per example, above 0.")
        low, high = _ends(self.b_simple, self.low, self.high, per_example, error)
        return dataclasses.replace(
            self,
            b_simple=_over(self.b_simple, per_example),
            low=low,
            high=high,
            trace=_over(self.trace, per_example),
            small_batch=_over(self.small_batch, per_example),
            large_batch=_over(self.large_batch, per_example),
            layers=tuple(_layer_in_examples(layer, per_example, error) for layer in self.layers),
            preconditioned=self.preconditioned and self.preconditioned.in_examples(per_example, error),
            eval_mode=self.eval_mode and self.eval_mode.in_examples(per_example, error),
            hessian=self.hessian and self.hessian.in_examples(per_example, error),
            trajectory=tuple(_point_in_examples(point, per_example, error) for point in self.trajectory),
            unit=None,
            counted=CountedNoise(self.unit, per_example, self.b_simple, self.low, self.high),
        )


def _layer_in_examples(layer: LayerNoise, per_example: float, error: float) -> LayerNoise:
    low, high = _ends(layer.b_simple, layer.low, layer.high, per_example, error)
    return dataclasses.replace(
        layer, b_simple=_over(layer.b_simple, per_example), low=low, high=high, trace=_over(layer.trace, per_example)
    )


def _point_in_examples(point: NoisePoint, per_example: float, error: float) -> NoisePoint:
    low, high = _ends(point.b_simple, point.low, point.high, per_example, error)
    return dataclasses.replace(
        point, b_simple=_over(point.b_simple, per_example), low=low, high=high, trace=_over(point.trace, per_example)
    )


def _over(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def _ends(
    value: float | None, low: float | None, high: float | None, by: float, error: float
) -> tuple[float | None, float | None]:
    """Both ends of an interval over a number of this relative error; independent, so added in logarithms."""

    def end(one: float | None, sign: int) -> float | None:
        if not one:
            return one
        own = abs(math.log(one / value)) if value else 0.0
        return (value or one) / by * math.exp(sign * math.hypot(own, _NORMAL * error))

    return end(low, -1), end(high, 1)


def unmeasured(notes: Sequence[Note]) -> NoiseScale | None:
    """A noise scale without figures that says why, by a run's notes; None where none of these speaks of it."""
    text = next((note.text for note in notes if note.figure == "noise"), None)
    if text is None:
        return None
    why = Note("noise.b_simple", f"the noise scale was not measured: {text.removeprefix('not measured: ')}")
    return NoiseScale(None, None, None, None, None, "unresolved", "", 0, notes=(why,))


@dataclass(frozen=True)
class NoiseTrajectory(Shown):
    """The gradient noise scale against training steps."""

    points: tuple[NoisePoint, ...]
    source: str
    unit: str | None = None
    notes: tuple[Note, ...] = ()
