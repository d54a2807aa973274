"""Records of the gradient noise scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pybatch.display import Shown
from pybatch.records.subject import Note

NoiseStatus = Literal["resolved", "lower_bound", "unresolved"]


@dataclass(frozen=True)
class LayerNoise:
    """Gradient noise scale of one parameter tensor, or of one group of them that is communicated together."""

    name: str
    b_simple: float | None
    grad_sq: float | None  # unclamped means, as in NoiseScale
    trace: float | None
    low: float | None = None
    high: float | None = None
    status: NoiseStatus = "unresolved"
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


@dataclass(frozen=True)
class NoiseScale(Shown):
    """Gradient noise scale B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, eq. 2.9), in examples.

    `resolved`: `low` and `high` bound it at 95 %. `lower_bound`: |G|^2 is not separated from zero, only `low` is
    known. `unresolved`: neither is. `grad_sq` and `trace` are the unclamped means and may be negative.
    """

    b_simple: float | None
    low: float | None
    high: float | None
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
    learning_rate: float | None = None  # of the warm-up training
    preconditioned: WeightedNoise | None = None  # experimental: A = 1 / (sqrt(v) + eps) of Adam
    layers: tuple[LayerNoise, ...] = ()
    notes: tuple[Note, ...] = ()
    hessian: WeightedNoise | None = None  # B_noise: A the Hessian of the loss (McCandlish et al. 2018, eq. 2.8)
    eval_mode: WeightedNoise | None = None  # A = 1, the model in evaluation mode: no dropout
    unit: str | None = None  # "tokens" where a batch is counted in them; None: in examples


@dataclass(frozen=True)
class NoisePoint:
    """The gradient noise scale over a stretch of a training run."""

    first_step: int  # training steps the pairs come from, both included
    last_step: int
    b_simple: float | None
    low: float | None
    high: float | None
    grad_sq: float | None
    trace: float | None
    status: NoiseStatus
    steps: int  # pairs of norms that entered
    loss: float | None = None  # mean of what was given for these steps
    reason: str | None = None


@dataclass(frozen=True)
class NoiseTrajectory(Shown):
    """The gradient noise scale against training steps."""

    points: tuple[NoisePoint, ...]
    source: str
    unit: str | None = None
    notes: tuple[Note, ...] = ()
