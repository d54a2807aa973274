"""Time to a loss, with all that is not known of it: pairs of curves that the measurements leave possible.

T(B) = S(B) t(B): optimizer steps times seconds per step. Each member of the ensemble is one curve of steps and one of
step times, drawn as a Gaussian process around the fitted models (universal kriging: Cressie 1993, section 3.4): the
models' unknowns vary as the data allow, the rest is a rough residual of the size that the fit misses, and both are
conditioned on what was measured. At a batch size that was run the members agree as the measurement does; between and
beyond they part. What is asked of T, the best batch or what twice the batch costs, is asked of every member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pybatch.answer.critical import Critical
from pybatch.fits import steps_model
from pybatch.fits.communication import step_s
from pybatch.fits.solver import Array
from pybatch.records import BatchPoint, Capacity, CommunicationFit, Curve, StepsFit, ThroughputFit

EFFICIENCY = 0.8  # parallel efficiency below which a further device is not called worth it
MAX_DEVICES = 65_536  # the search for devices ends here
MEMBERS = 500  # ends of a 95 % interval are then those of 12 members
NORMAL = 1.959964

_STEP = 1.06  # from one batch size of the grid to the next
_TOP = 64.0  # the grid ends at so many times the largest batch that anything is known of
_FEW = 8  # of so many members one, where each number of devices is asked
_SEED = 20181126  # the same records give the same answer
_VAGUE = 3.0  # prior standard deviation of the models' log-parameters: the data decide
# Residual processes: correlation length in ln B, and the least standard deviation that is believed.
# Share: of the misfit that is taken for the curve's own shape; the rest is error of single measurements.
_STEPS_LENGTH, _STEPS_LEAST, _STEPS_SHARE = 1.0, 0.02, 0.5
_TIMES_LENGTH, _TIMES_LEAST, _TIMES_SHARE = 0.7, 0.01, 0.5
_DISTURBED_SHARE = 0.2  # likewise: what a disturbed machine scatters is hardly the curve's
# Where nothing measured the bend's shape: ln(alpha) of the power model, and ln(p) of the smooth one.
_TILT = 0.18
_SHARPER, _SHARP = 0.3, 0.35
_EXPONENTS = {"power": steps_model.EXPONENTS, "smooth": steps_model.SHARPNESS, "power-law": steps_model.SLOPES}
_TINY = 1e-6  # examples: a half batch below it is none


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
        """The candidate of least expected regret: the mean over members of ln T(B) - min ln T, whose last term is
        the same for all."""
        return min(candidates, key=lambda batch: float(self.time(batch)))

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
            k = k + 1 if k < 16 else math.ceil(1.1 * k)
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
    timed = [p for p in capacity.batches if p.status == "ok" and p.step_ms]
    ran = _observed(curve)
    known = [critical.high or critical.value, *(p.batch for p in timed), *ran[0]]
    top = max(min(_TOP * max(known), 1e12), 2.0)
    marks = [p.batch for p in timed] + list(ran[0]) + [b for b in (most, most_global) if b <= top]
    if fit.wave is not None:
        marks += [fit.wave * k for k in range(1, 65)]
    count = 2 + int(math.log(top) / math.log(_STEP))
    size = np.unique(np.concatenate([np.geomspace(1, top, count), [m for m in marks if 1 <= m <= top]]))
    rng = np.random.default_rng(_SEED)
    absolute = len(ran[0]) > 0 and critical.shape is not None
    if absolute and critical.shape is not None:
        steps = _measured_steps(size, critical, critical.shape, ran, rng)
    else:
        steps = _modelled_steps(size, critical, rng)
    return Ensemble(
        size,
        steps,
        _step_times(size, fit, timed, bool(capacity.disturbed), rng),
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


def _measured_steps(
    size: Array, critical: Critical, shape: StepsFit, ran: tuple[Array, Array, Array], rng: np.random.Generator
) -> Array:
    """ln S [n, g] around the fit, through the steps that were measured."""
    assert shape.model is not None
    model, names = shape.model, steps_model.NAMES[shape.model]
    middle = np.log([shape.parameters[name] for name in names])
    if model == "hyperbola":  # what other bends would do is not known to be nothing
        model, middle = "power", np.append(middle, 0.0)
    prior = np.full(len(middle), _VAGUE)
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

    slopes = steps_model.log_steps(model, middle[None], size)[1][0]
    return _kriged(size, curve, middle, slopes, start, prior, _STEPS_LENGTH, _STEPS_LEAST, _STEPS_SHARE, *ran, rng)


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


def _step_times(
    size: Array, fit: ThroughputFit, timed: Sequence[BatchPoint], disturbed: bool, rng: np.random.Generator
) -> Array:
    """ln t [n, g] around the fit, through the step times that were measured."""
    whole = fit.wave * np.ceil(size / fit.wave) if fit.wave is not None else size
    middle = np.log([max(fit.alpha_s, _TINY * fit.beta_s), fit.beta_s] + [fit.t0_s] * (fit.model == "floor"))

    def curve(p: Array) -> Array:
        rising: Array = np.logaddexp(p[:, :1], p[:, 1:2] + np.log(whole))
        return np.maximum(rising, p[:, 2:3]) if p.shape[1] == 3 else rising

    variable = fit.beta_s * whole / (fit.alpha_s + fit.beta_s * whole)
    slopes = np.stack([1 - variable, variable], -1)
    if fit.model == "floor":
        flat = fit.alpha_s + fit.beta_s * whole < fit.t0_s
        slopes = np.column_stack([np.where(flat[:, None], 0.0, slopes), np.where(flat, 1.0, 0.0)])
    x = np.array([float(p.batch) for p in timed])
    y = np.log([(p.step_ms or math.nan) / 1e3 for p in timed])
    variance = np.array([variance_of(p) for p in timed])
    prior = np.full(len(middle), _VAGUE)
    share = _DISTURBED_SHARE if disturbed else _TIMES_SHARE
    return _kriged(size, curve, middle, slopes, middle, prior, _TIMES_LENGTH, _TIMES_LEAST, share, x, y, variance, rng)


def variance_of(point: BatchPoint) -> float:
    """Of ln step time, by its 95 % interval, or by what its visits differ, which one stretch of steps does not show."""
    within = 0.01**2
    if point.step_ms_low and point.step_ms_high:
        within = (math.log(point.step_ms_high / point.step_ms_low) / (2 * NORMAL)) ** 2
    visits: dict[int, list[float]] = {}
    for block, of in zip(point.blocks_ms, point.block_rounds, strict=False):
        visits.setdefault(of, []).append(math.log(block))
    if len(visits) < 2:
        return within
    return max(within, float(np.var([np.median(v) for v in visits.values()], ddof=1)) / len(visits))


def _kriged(
    size: Array,
    curve: Callable[[Array], Array],
    middle: Array,
    slopes: Array,
    start: Array,
    prior: Array,
    length: float,
    least: float,
    share: float,
    x: Array,
    y: Array,
    variance: Array,
    rng: np.random.Generator,
) -> Array:
    """Members [n, g] of a curve and a residual, given y at the batch sizes x.

    The curve's unknowns follow from its slopes at the fit; the curve itself is then drawn as it is, and the residual
    conditioned on what it leaves of the data. Where the curve is linear in them this is universal kriging exactly.

    Args:
        size: [g] batch sizes, which hold x.
        curve: its unknowns [n, p] to values [n, g].
        middle, slopes: [p], [g, p]: the fitted unknowns, and d curve / d unknowns there.
        start, prior: [p]: mean and standard deviation of the unknowns before the data.
        length, least: of the residual, an Ornstein-Uhlenbeck process in ln B: as rough as waves and cliffs are.
        share: of the misfit that the residual is taken to have; the rest is error of single measurements.
        x, y, variance: [o] what was measured, with its variance.
        rng: of the draws.
    """
    log, at = np.log(size), np.searchsorted(size, x)
    fitted = curve(middle[None])[0]
    missed = y - fitted[at]
    free = max(len(x) - len(middle), 1)
    misfit = max(float(np.sum(missed**2) / free - variance.mean()), 0.0) if len(x) else 0.0
    own = max(share * misfit, least**2)
    variance = variance + (1 - share) * misfit
    decay = np.exp(-np.diff(log) / length)
    rough = rng.standard_normal((MEMBERS, len(size))) * math.sqrt(own)
    for i in range(1, len(size)):
        rough[:, i] = decay[i - 1] * rough[:, i - 1] + math.sqrt(1 - decay[i - 1] ** 2) * rough[:, i]
    unknowns = start + prior * rng.standard_normal((MEMBERS, len(prior)))
    if not len(x):
        return curve(unknowns) + rough
    told = y + np.sqrt(variance) * rng.standard_normal((MEMBERS, len(x)))
    within = own * np.exp(-np.abs(log[:, None] - log[at]) / length)
    inner = within[at] + np.diag(variance)
    linear = (slopes[at] * prior**2) @ slopes[at].T
    gap = told - fitted[at] - (unknowns - middle) @ slopes[at].T - rough[:, at]
    unknowns = unknowns + np.linalg.solve(inner + linear, gap.T).T @ (slopes[at] * prior**2)
    drawn = curve(unknowns) + rough
    result: Array = drawn + np.linalg.solve(inner, (told - drawn[:, at]).T).T @ within.T  # Matheron's rule
    return result
