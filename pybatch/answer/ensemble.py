"""Time to a loss, with all that is not known of it: pairs of curves that the measurements leave possible.

T(B) = S(B) t(B): optimizer steps times seconds per step. Each member of the ensemble is one curve of steps and one of
step times, drawn as a Gaussian process around the fitted models (`kriging`): the models' unknowns vary as the data
allow, the rest is a rough residual of the size that the fit misses, and both are conditioned on what was measured. At a
batch size that was run the members agree as the measurement does; between and beyond they part. What is asked of T, the
best batch or what twice the batch costs, is asked of every member.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pybatch.answer.critical import Critical
from pybatch.answer.evidence import NORMAL
from pybatch.answer.kriging import VAGUE, kriged
from pybatch.answer.step_times import drawn_step_times, marks, possible, variance_of
from pybatch.fits import steps_model
from pybatch.fits.communication import step_s
from pybatch.fits.solver import Array
from pybatch.records import BatchPoint, Capacity, CommunicationFit, Curve, StepsFit
from pybatch.scaling import LOGGED, SEARCHED

EFFICIENCY = 0.8  # parallel efficiency below which a further device is not called worth it
MAX_DEVICES = 65_536  # the search for devices ends here
MEMBERS = 500  # ends of a 95 % interval are then those of 12 members

_STEP = 1.06  # from one batch size of the grid to the next
_TOP = 64.0  # the grid ends at so many times the largest batch that anything is known of
_FEW = 8  # of so many members one, where each number of devices is asked
_SEED = 20181126  # the same records give the same answer
# Of the residual of steps: correlation length in ln B, the least standard deviation that is believed, and its share of
# the misfit; the rest is error of single measurements.
_LENGTH, _LEAST, _SHARE = 1.0, 0.02, 0.5
# Where nothing measured the bend's shape: ln(alpha) of the power model, and ln(p) of the smooth one.
_TILT = 0.18
_SHARPER, _SHARP = 0.3, 0.35
_EXPONENTS = {"power": steps_model.EXPONENTS, "smooth": steps_model.SHARPNESS, "power-law": steps_model.SLOPES}


@dataclass(frozen=True)
class Ensemble:
    """Members [n] of steps and seconds per step on a grid of batch sizes [g], ascending from 1.

    Where steps to a target were not measured they are over S_min, and so is time: only ratios mean something.
    Communication is counted where it was measured; else time on several devices is a lower bound.
    """

    size: Array
    log_steps: Array  # [n, g]
    log_step_s: Array  # [n, g]
    most: float = math.inf  # largest batch on one device
    most_global: float = math.inf  # largest batch on all devices together: the data set
    communication: CommunicationFit | None = None
    absolute: bool = False  # steps are those to a target

    @property
    def bound(self) -> float:
        """The largest batch on one device, by memory and data."""
        return min(self.most, self.most_global)

    def steps(self, batch: Any, members: bool = False) -> Any:
        """Steps at a global batch: the ensemble's middle, or [n] of each member."""
        return np.exp(self._at(self.log_steps if members else self._middle[0], batch))

    def step_s(self, batch: Any, members: bool = False) -> Any:
        """Seconds per step at a batch on one device."""
        return np.exp(self._at(self.log_step_s if members else self._middle[1], batch))

    def examples(self, batch: Any, members: bool = False) -> Any:
        return batch * self.steps(batch, members)

    def time(self, batch: Any, devices: float = 1.0, members: bool = False) -> Any:
        """Time at a global batch on so many devices, in seconds (per S_min)."""
        step = self.step_s(np.maximum(np.asarray(batch) / devices, 1.0), members)
        if self.communication is not None and devices > 1:
            step = step_s(self.communication, step, devices)
        return self.steps(batch, members) * step

    def best(self, candidates: Sequence[int]) -> int:
        """The candidate of least expected regret, the mean over members of T(B) / min T."""
        sizes = np.array(candidates, dtype=float)
        least = self._times_on_grid(1.0, members=True).min(axis=1)
        expected = np.mean(self.time(sizes, members=True) / np.exp(least)[:, None], axis=0)
        return int(candidates[int(expected.argmin())])

    def ratio(
        self, once: float, other: float, batches: Sequence[BatchPoint], mixed: bool = False
    ) -> tuple[float, float, bool]:
        """ln of the time at `other` over that at `once`: mean, standard deviation, and whether by measured step times.

        They are taken where both batch sizes were timed; if `mixed`, also where `other` was.
        """
        timed = {p.batch: p for p in batches if p.status == "ok" and p.step_ms and p.batch in (once, other)}
        if mixed and list(timed) == [other]:
            own = timed[int(other)]
            steps = np.log(self.steps(other, members=True) / self.time(once, members=True))
            middle = float(steps.mean()) + math.log((own.step_ms or math.nan) / 1e3)
            return middle, math.sqrt(float(steps.var()) + variance_of(own)), True
        if len(timed) < 2:
            times = np.log(self.time(other, members=True) / self.time(once, members=True))
            return float(times.mean()), float(times.std()), False
        first, second = timed[int(once)], timed[int(other)]
        steps = np.log(self.steps(other, members=True) / self.steps(once, members=True))
        middle = float(steps.mean()) + math.log((second.step_ms or math.nan) / (first.step_ms or math.nan))
        return middle, math.sqrt(float(steps.var()) + variance_of(first) + variance_of(second)), True

    def optimum(self, devices: float = 1.0) -> float:
        """Global batch of least time by the ensemble's middle."""
        grid, found = self._grid(devices), self._times_on_grid(devices, members=False)
        return float(grid[np.argmin(found)])

    @cached_property
    def optima(self) -> Array:
        """Best batch on one device [n], of each member."""
        grid = self._grid(1.0)
        best: Array = grid[np.argmin(self._times_on_grid(1.0, members=True), axis=1)]
        return best

    def regret(self, batch: float) -> Array:
        """T(batch) over the least on one device [n], of each member."""
        least = self._times_on_grid(1.0, members=True).min(axis=1)
        found: Array = self.time(batch, members=True) / np.exp(least)
        return np.maximum(found, 1.0)

    def useful_devices(self) -> tuple[int, int, int]:
        """Most devices K with T(1) / (K T(K)) >= EFFICIENCY all the way up to K, each K at its own best batch.

        By the middle, and the ends of 95 % of the members.
        """
        few = replace(self, log_steps=self.log_steps[::_FEW], log_step_s=self.log_step_s[::_FEW])
        alone, each = self._least(1.0, False), few._least(1.0, True)
        last, members, standing = 1, np.ones(len(each)), np.ones(len(each), dtype=bool)
        going, k = True, 1
        while (going or standing.any()) and k < MAX_DEVICES:
            k = k + 1 if k < 16 else min(math.ceil(1.1 * k), MAX_DEVICES)
            worth = math.log(k * EFFICIENCY)
            going = going and alone - self._least(k, False) >= worth
            last = k if going else last
            if standing.any():
                standing &= each - few._least(k, True) >= worth
                members[standing] = k
        last = self._refined(alone, last)
        low, high = np.quantile(members, [0.025, 0.975], method="nearest")
        return last, min(int(low), last), max(int(high), last)

    def _refined(self, alone: float, last: int) -> int:
        """The most devices exactly, above the last number looked at in steps of 10 %."""
        while 16 <= last < MAX_DEVICES and alone - self._least(last + 1, False) >= math.log((last + 1) * EFFICIENCY):
            last += 1
        return last

    def _least(self, devices: float, members: bool) -> Any:
        """ln of the least time on so many devices, over global batches of one example each or more."""
        found = self._times_on_grid(devices, members).min(axis=-1)
        return found if members else float(found)

    def _times_on_grid(self, devices: float, members: bool) -> Any:
        grid = self._grid(devices)
        steps, step = (self.log_steps, self.log_step_s) if members else self._middle
        if devices == 1.0:
            count = len(grid)
            return steps[..., :count] + step[..., :count]
        share = self._at(step, grid / devices)
        if self.communication is not None:
            share = np.log(step_s(self.communication, np.exp(share), devices))
        return self._at(steps, grid) + share

    def _grid(self, devices: float) -> Array:
        """Global batches to choose from on so many devices."""
        if devices == 1.0:
            return self.size[: max(1, int(np.searchsorted(self.size, self.bound, side="right")))]
        top = min(devices * min(self.most, self.size[-1]), self.most_global, self.size[-1])
        inner = self.size[(self.size >= devices) & (self.size <= top)]
        whole: Array = np.unique(np.append(inner, max(min(top, self.most_global), min(devices, self.most_global))))
        return whole

    @cached_property
    def _middle(self) -> tuple[Array, Array]:
        return self.log_steps.mean(axis=0), self.log_step_s.mean(axis=0)

    def _at(self, values: Array, batch: Any) -> Array:
        """Values [..., g] at batches, linear in ln B; past the grid by its last slope."""
        x, grid = np.log(np.asarray(batch, dtype=float)), self._log_size
        right = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
        share = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
        found: Array = (1 - share) * values[..., right - 1] + share * values[..., right]
        return found

    @cached_property
    def _log_size(self) -> Array:
        log: Array = np.log(self.size)
        return log


def ensemble_of(
    critical: Critical, capacity: Capacity, most: float, most_global: float, communication: CommunicationFit | None
) -> Ensemble:
    """What the evidence on the critical batch and the step times leave possible.

    Args:
        critical: with a value, and the curve of steps where one was measured.
        capacity: with a throughput fit.
        most, most_global: the largest batch on one device, and on all together.
        communication: between devices; None: not measured.
    """
    fit, curve = capacity.model, critical.curve
    assert fit is not None  # the caller has looked
    assert critical.value is not None
    distinct = {p.batch: p for p in capacity.batches if p.status == "ok" and p.step_ms}
    timed = [distinct[batch] for batch in sorted(distinct)]
    ran = _observed(curve)
    known = [critical.high or critical.value, *(p.batch for p in timed), *ran[0]]
    top = max(min(_TOP * max(known), 1e12), *(p.batch for p in timed), *ran[0], 2.0)
    found = possible(fit, timed)
    every = [p.batch for p in timed] + list(ran[0]) + [b for b in (most, most_global) if b <= top] + marks(found)
    count = 2 + int(math.log(top) / math.log(_STEP))
    size = np.unique(np.concatenate([np.geomspace(1, top, count), [m for m in every if 1 <= m <= top]]))
    rng = np.random.default_rng(_SEED)
    absolute = len(ran[0]) > 0 and critical.shape is not None
    if absolute and critical.shape is not None:
        steps = _measured_steps(size, critical, critical.shape, ran, rng)
    else:
        steps = _modelled_steps(size, critical, rng)
    return Ensemble(
        size,
        steps,
        drawn_step_times(MEMBERS, size, found, timed, bool(capacity.disturbed), rng),
        most,
        most_global,
        communication,
        absolute,
    )


def _observed(curve: Curve | None) -> tuple[Array, Array, Array]:
    """Batch sizes, ln of their median steps, and its variance by the scatter of seeds, pooled over batch sizes."""
    points = [p for p in curve.points if p.status == "reached" and p.steps] if curve is not None else []
    spread, freedom = 0.0, 0
    for point in points:
        own = next((r for r in point.rates if r.learning_rate == point.learning_rate), None)
        log = np.log([s for s in own.steps if s]) if own is not None else np.zeros(0)
        if len(log) > 1:
            spread, freedom = spread + float(np.sum((log - log.mean()) ** 2)), freedom + len(log) - 1
    fit = curve.fit if curve is not None else None
    pooled = spread / freedom if freedom else ((fit.rms_log_error if fit is not None else None) or 0.05) ** 2
    log_steps, variance = [], []
    for point in points:
        assert point.steps is not None
        before = point.steps_before if point.steps_before and point.steps_before > 0 else point.steps
        width = math.log(point.steps / before)  # the target was met between two evaluations
        log_steps.append(math.log(point.steps) - width / 2)
        many = max(1, point.reached or point.seeds)
        variance.append((math.pi / 2 if many > 2 else 1.0) * pooled / many + width**2 / 12)
    return np.array([float(p.batch) for p in points]), np.array(log_steps), np.array(variance)


@dataclass(frozen=True)
class Turn:
    """Where a sweep's examples, or steps, are fewest: not towards the end that step times alone ask for."""

    batch: int  # of those tested
    low: int  # between these they are fewest, as far as the sweep can tell
    high: int | None  # None: it ends there
    against: int  # the tested end at which there are surely more


def turn_of(curve: Curve | None, examples: bool) -> Turn | None:
    """The turn of a tuned curve's examples, surely more at the smallest batch; or steps, surely more at the largest."""
    if curve is None or curve.rule not in (SEARCHED, LOGGED):
        return None
    size, log_steps, variance = _observed(curve)
    if len(size) < 3:
        return None
    order = np.argsort(size)
    size, cost, variance = size[order], log_steps[order] + np.log(size[order]) * examples, variance[order]
    least = int(np.argmin(cost))
    more = cost - cost[least] > NORMAL * np.sqrt(variance + variance[least])
    if not more[0 if examples else -1]:
        return None
    below, above = np.flatnonzero(more[:least]), least + np.flatnonzero(more[least:])
    low = int(size[below[-1]]) if len(below) else int(size[0])
    high = int(size[above[0]]) if len(above) else None
    return Turn(int(size[least]), low, high, int(size[0 if examples else -1]))


def _measured_steps(
    size: Array, critical: Critical, shape: StepsFit, ran: tuple[Array, Array, Array], rng: np.random.Generator
) -> Array:
    """ln S [n, g] around the fit, through the steps that were measured."""
    assert shape.model is not None
    model, names = shape.model, steps_model.NAMES[shape.model]
    middle = np.log([shape.parameters[name] for name in names])
    if model == "hyperbola":  # what other bends would do is not known to be nothing
        model, middle = "power", np.append(middle, 0.0)
    prior = np.full(len(middle), VAGUE)
    if shape.model == "hyperbola":
        prior[2] = _TILT
    start = middle.copy()
    if critical.prediction is not None and shape.critical_batch and "b_c" in names:
        # Of what only predicts the critical batch: moving the bend moves the critical batch by the same factor.
        value, error = critical.prediction
        start[1] += math.log(value / shape.critical_batch)
        prior[1] = error
    low, high = np.full(len(middle), -np.inf), np.full(len(middle), np.inf)
    if model in _EXPONENTS:
        low[-1], high[-1] = np.log(_EXPONENTS[model])

    def curve(p: Array) -> Array:
        return steps_model.log_steps(model, np.clip(p, low, high), size)[0]

    def drawn(count: int, free: int) -> Array:
        """Members with the first so many unknowns free, and the others as they are."""

        def held(p: Array) -> Array:
            return curve(np.concatenate([p, np.broadcast_to(middle[free:], (len(p), len(middle) - free))], -1))

        slopes = steps_model.log_steps(model, middle[None], size)[1][0, :, :free]
        own = middle[:free], slopes, start[:free], prior[:free]
        return kriged(count, size, held, *own, _LENGTH, _LEAST, _SHARE, *ran, rng)

    if model != "smooth":
        return drawn(MEMBERS, len(middle))
    kink, weight = _kink(middle, *ran)
    sharp = round(MEMBERS * weight)
    found = drawn(MEMBERS - sharp, len(middle))
    if not sharp:
        return found
    start[:2] += kink[:2] - middle[:2]
    middle = kink
    return np.concatenate([found, drawn(sharp, 2)])


def _kink(p: Array, size: Array, log_steps: Array, variance: Array) -> tuple[Array, float]:
    """The sharpest smooth curve [3] through these steps, and its weight by likelihood beside the one fitted.

    Far from the fit the sharpness is not drawn by its slope there: a kink (Golmant et al. 2018) is a shape of its own.
    """
    sharp = np.log(steps_model.SHARPNESS[1])
    bends = p[1] + np.linspace(-1, 1, 201)
    tried = np.stack([np.zeros(201), bends, np.full(201, sharp)], -1)
    apart = log_steps - steps_model.log_steps("smooth", tried, size)[0]
    tried[:, 0] = np.average(apart, axis=1, weights=1 / variance)
    missed = np.sum((apart - tried[:, :1]) ** 2 / variance, axis=1)
    own = float(np.sum((log_steps - steps_model.log_steps("smooth", p[None], size)[0][0]) ** 2 / variance))
    scale = max(1.0, own / max(1, len(size) - len(p)))  # of a misfit beyond the runs' own spread
    better = math.exp(-max(float(missed.min()) - own, 0.0) / scale / 2)
    return tried[missed.argmin()], better / (1 + better)


def _modelled_steps(size: Array, critical: Critical, rng: np.random.Generator) -> Array:
    """ln S over S_min [n, g] where the critical batch alone is known: by its value, its error, and unknown shape."""
    bend = critical.drawn(rng.standard_normal(MEMBERS))
    tilt, sharp = _TILT * rng.standard_normal(MEMBERS), _SHARP * rng.standard_normal(MEMBERS)
    half = MEMBERS // 2
    power = np.stack([np.zeros(half), bend[:half], tilt[:half]], -1)
    smooth = np.stack([np.zeros(MEMBERS - half), bend[half:], _SHARPER + sharp[half:]], -1)
    found: Array = np.concatenate(
        [steps_model.log_steps(m, p, size)[0] for m, p in (("power", power), ("smooth", smooth))]
    )
    return found
