"""Seconds per step at every batch size, as those timed leave them possible: lines, floors, waves and cliffs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pybatch.answer.evidence import NORMAL
from pybatch.answer.kriging import VAGUE, kriged
from pybatch.fits.solver import Array
from pybatch.fits.throughput_model import log_time
from pybatch.fits.throughput_shapes import FLOOR_LEAST, Shape, shapes, weights_of
from pybatch.records import BatchPoint, ThroughputFit

# The residual: its correlation length in ln B, the least standard deviation that is believed, and its share of the
# misfit; the rest is error of single measurements.
_LENGTH, _LEAST, _SHARE = 0.7, 0.01, 0.5
_DISTURBED_ERROR = 1.0  # likewise, of a disturbed machine: all of it may be error, and half the curve's all the same
_TINY = 1e-6  # examples: a half batch below it is none, and one above its inverse is without end
_ON_FLOOR = 2  # batch sizes that tell a floor
_HARDLY = 1e-3  # of all members: less than one
_WAVES = 24  # of the first so many the ends are on the grid: there a wave is used whole


@dataclass(frozen=True)
class StepTimes:
    """One shape of the curve: its unknowns ln alpha, ln beta and ln floor, and the share of members that have it."""

    unknowns: Array
    share: float
    wave: int | None = None
    edge: float | None = None  # of a cliff
    past: tuple[Array, Array] | None = None  # batch sizes past it, and how much longer, in ln, their steps take

    def log_s(self, p: Array, size: Array) -> Array:
        """ln t [n, g] by unknowns [n, p], without what a cliff adds."""
        rising: Array = np.logaddexp(p[:, :1], p[:, 1:2] + np.log(self._whole(size)))
        return np.maximum(rising, p[:, 2:3]) if p.shape[1] == 3 else rising

    def slopes(self, size: Array) -> Array:
        """Of `log_s` by each unknown [g, p]."""
        alpha, variable = math.exp(self.unknowns[0]), math.exp(self.unknowns[1]) * self._whole(size)
        share = variable / (alpha + variable)
        slopes = np.stack([1 - share, share], -1)
        if len(self.unknowns) == 3:
            flat = alpha + variable < math.exp(self.unknowns[2])
            slopes = np.column_stack([np.where(flat[:, None], 0.0, slopes), np.where(flat, 1.0, 0.0)])
        return slopes

    def leaps(self, size: Array, count: int, rng: np.random.Generator) -> Array:
        """What a cliff adds [n, g]: where between two batch sizes timed it lies is not known."""
        if self.past is None or self.edge is None:
            return np.zeros((count, 1))
        at = rng.uniform(math.log(self.edge), math.log(self.past[0][0]), (count, 1))
        return np.where(np.log(size) > at, np.interp(np.log(size), np.log(self.past[0]), self.past[1]), 0.0)

    def _whole(self, size: Array) -> Array:
        whole: Array = self.wave * np.ceil(size / self.wave) if self.wave is not None else size
        return whole


def possible(fit: ThroughputFit, timed: Sequence[BatchPoint]) -> list[StepTimes]:
    """The fitted shape, and those beside it that the times do not exclude, by their Akaike weights.

    Args:
        fit: of the times.
        timed: in ascending order.
    """
    slope = max(fit.beta_s, _TINY * fit.alpha_s)
    fitted = [max(fit.alpha_s, _TINY * slope), slope] + [fit.t0_s] * (fit.model == "floor")
    own, (x, y) = StepTimes(np.log(fitted), 1.0, fit.wave), _observed(timed)
    if len(x) < FLOOR_LEAST:
        return [own]
    found = [shape for shape in shapes(x, y) if not _unseen_floor(shape)]
    weights = weights_of(found)
    shown = min((i for i, each in enumerate(found) if each.shown), key=lambda i: found[i].score)
    made = [_of(each, float(weight), x, y) for each, weight in zip(found, weights, strict=True)]
    made[shown] = replace(own, share=made[shown].share)
    return made


def marks(found: Sequence[StepTimes]) -> list[float]:
    """Batch sizes at which a curve that members have bends: ends of waves."""
    waves = [each.wave for each in found if each.wave is not None and each.share > _HARDLY]
    return [float(k * wave) for wave in waves for k in range(1, _WAVES + 1)]


def drawn_step_times(
    count: int,
    size: Array,
    found: Sequence[StepTimes],
    timed: Sequence[BatchPoint],
    disturbed: bool,
    rng: np.random.Generator,
) -> Array:
    """ln t [n, g] around the shapes, each with its share of the members, through the step times that were measured."""
    x, y = _observed(timed)
    variance = np.array([variance_of(p) for p in timed])
    ends = np.round(count * np.cumsum([each.share for each in found])).astype(int)
    drawn = []
    for each, many in zip(found, np.diff(ends, prepend=0).tolist(), strict=True):
        if many:
            drawn.append(_members(each, many, size, x, y, variance, disturbed, rng))
    every: Array = np.concatenate(drawn)
    return every[rng.permutation(count)] if len(drawn) > 1 else every  # members of steps have an order, too


def _members(
    of: StepTimes,
    count: int,
    size: Array,
    x: Array,
    y: Array,
    variance: Array,
    disturbed: bool,
    rng: np.random.Generator,
) -> Array:
    leaps, prior = of.leaps(size, count, rng), np.full(len(of.unknowns), VAGUE)
    return kriged(
        count,
        size,
        lambda p: of.log_s(p, size) + leaps[: len(p)],
        of.unknowns,
        of.slopes(size),
        of.unknowns,
        prior,
        _LENGTH,
        _LEAST,
        _SHARE,
        x,
        y,
        variance,
        rng,
        len(of.past[0]) if of.past is not None else 0,
        _DISTURBED_ERROR if disturbed else None,
    )


def _of(shape: Shape, share: float, x: Array, y: Array) -> StepTimes:
    """A shape by its unknowns here; past a cliff it takes what was measured."""
    beta, half = float(shape.p[0]), max(float(shape.p[1]), math.log(_TINY))
    made = StepTimes(np.array([beta + half, beta, *shape.p[2:]]), share, shape.wave)
    if shape.kept.all():
        return made
    past = np.sort(x[~shape.kept])
    longer = y[np.searchsorted(x, past)] - made.log_s(made.unknowns[None], past)[0]
    return replace(made, edge=float(x[shape.kept].max()), past=(past, longer))


def _unseen_floor(shape: Shape) -> bool:
    """Whether hardly a batch size lies on the floor: a line, whose floor nothing then holds."""
    return shape.model == "floor" and int(np.sum(log_time(shape.p, shape.size)[1][:, 2])) < _ON_FLOOR


def _observed(timed: Sequence[BatchPoint]) -> tuple[Array, Array]:
    """Batch sizes and ln seconds per step."""
    return np.array([float(p.batch) for p in timed]), np.log([(p.step_ms or math.nan) / 1e3 for p in timed])


def variance_of(point: BatchPoint) -> float:
    """Of ln step time, by its 95 % interval, or by what its visits differ, which one stretch of steps does not show."""
    within = 0.01**2
    if point.step_ms_low and point.step_ms_high:
        within = (math.log(point.step_ms_high / point.step_ms_low) / (2 * NORMAL)) ** 2
    visits: dict[int, list[float]] = {}
    for block, of in zip(point.blocks_ms, point.block_rounds, strict=False):
        if block > 0:
            visits.setdefault(of, []).append(math.log(block))
    if len(visits) < 2:
        return within
    return max(within, float(np.var([np.median(v) for v in visits.values()], ddof=1)) / len(visits))
