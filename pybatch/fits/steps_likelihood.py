"""The likelihood of steps to target under one model, its best fit, and by what models are compared.

Errors are normal in log steps, with tails that count linearly; see `steps` for what counts how. A run that is late
among those of its batch size, or with all of them among its neighbours, may be stuck: with a small probability it takes
any steps up to LATE times as many, or never reaches, whatever the batch size. Its pull on the curve ends where that is
the likelier story (a mixture, as in Hogg, Bovy and Lang 2010, section 3), so that one such run bends nothing, however
late and wherever the cap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtri, log_ndtr

from pybatch.fits import steps_model
from pybatch.fits.solver import Array, Evaluate, Rows, aicc, minimize
from pybatch.fits.steps_data import CENSORED, REACHED, Cells

STUCK = 0.05  # of runs, before their steps are seen
LATE = math.log(1e3)  # log steps past the curve over which a stuck run that reaches may lie
SOFT = 3.0  # standard deviations from which on a residual counts linearly
RESOLUTION = 2e-3  # log steps: steps are whole numbers, and a perfect fit must not drive AICc to minus infinity
LEAST_THREE = 4  # batch sizes for a model of three unknowns
ROUGH = 0.15  # log steps (rms): of four, nearer to a curve of two unknowns a chosen rate may have put them
FEW = 8  # runs up to which AICc has no correction, or one of 6 to 20 against any bend: models are compared without it
CHANCE = 0.01  # that a third unknown is taken for nothing, of so few runs
SETTLED = 1e-3  # relative change of the error's size from which on it stands
SUPPORT = 4.0  # of AICc: within it the hyperbola has support and stands (Burnham and Anderson 2002, section 2.6)


@dataclass(frozen=True)
class Fit:
    """The best parameters of one model."""

    model: str
    p: Array  # [P]
    sigma: float  # of the error in log steps
    score: float  # AICc, or AIC of few runs, see `data_points`


def candidates(reached: int) -> list[str]:
    """The models that so many batch sizes that reached the target can tell apart."""
    return [name for name, unknowns in steps_model.NAMES.items() if len(unknowns) < 3 or reached >= LEAST_THREE]


def best_of(fits: list[Fit], size: Array, data: Cells) -> Fit:
    """The best of these fits, by AICc and `handicap`.

    Of four batch sizes, whose runs may err together, a third unknown is taken only where they lie far from every curve
    of two, and not by one seed, which has nothing left to show an error by.
    """
    reached = data.kind[0] == REACHED
    runs = int((data.kind > 0).sum())

    def score(fit: Fit) -> float:
        return float(fit.score + handicap(fit.model, runs))

    best = min(fits, key=score)
    plain = [fit for fit in fits if len(fit.p) < 3]
    if len(best.p) < 3 or not plain or reached.any(-1).sum() > LEAST_THREE:
        return best
    simple = min(plain, key=score)
    value = steps_model.log_steps(simple.model, simple.p[None], size)[0][0]
    off = [np.median(row[own]) - at for row, own, at in zip(data.log[0], reached, value, strict=True) if own.any()]
    return simple if reached.sum(-1).max() == 1 or math.sqrt(np.mean(np.square(off))) < ROUGH else best


def handicap(model: str, runs: Any) -> Any:
    """What a model other than the hyperbola must do better, by AICc. Runs of one seed, and seeds of one batch size, err
    together, so that AICc sees more data than there are, and a third unknown moves B_50 by half for nothing. Of few
    `runs`, whose errors a third unknown may follow by chance, it is what an F test of it asks."""
    if len(steps_model.NAMES[model]) < 3:
        return SUPPORT if model == "power-law" else 0.0
    rest = np.maximum(np.asarray(runs) - 3.0, 1.0)
    tested = (rest + 3) * np.log1p(fdtri(1, rest, 1 - CHANCE) / rest) - 2  # which AIC takes for each unknown
    return np.where(np.asarray(runs) > FEW, SUPPORT, tested)


def data_points(runs: Any) -> Any:
    """Data points for AICc, infinite where they are so few that its correction would leave no model with a bend."""
    return np.where(np.asarray(runs) > FEW, runs, np.inf)


def shares(fit: Fit, size: Array, data: Cells) -> Array:
    """The probability of each run [n, seeds] not to be stuck, 0 of one that did not take part."""
    kind = data.kind[0]
    residual = data.log[0] - steps_model.log_steps(fit.model, fit.p[None], size)[0][0][:, None]
    found = ordinary(residual, fit.sigma**2 + data.variance[0], data.late[0])
    survival = (1 - STUCK) * np.exp(log_ndtr(-residual / fit.sigma))
    found = np.where((kind == CENSORED) & data.late[0], survival / (survival + STUCK), found)
    taking: Array = np.where(kind > 0, found, 0.0)
    return taking


def ordinary(residual: Array, variance: Array, late: NDArray[np.bool_]) -> Array:
    """The probability that runs of these residuals in log steps, of this variance, are not stuck."""
    square = SOFT**2 * (np.sqrt(1 + residual**2 / (SOFT**2 * variance)) - 1)
    odds = STUCK / (1 - STUCK) * np.sqrt(2 * math.pi * variance) / LATE * np.exp(np.minimum(square, 500.0))
    found: Array = np.where(late & (residual > 0), 1 / (1 + odds), 1.0)
    return found


def evaluator(model: str, size: Array, data: Cells, sigma: float) -> Evaluate:
    """Minus log likelihood, without its ln sigma, as `minimize` wants it."""
    of_reached, of_censored = data.kind == REACHED, data.kind == CENSORED
    any_censored, all_reached = bool(of_censored.any()), bool(of_reached.all())
    errors = np.sqrt(sigma**2 + data.variance)
    if (errors == errors.flat[0]).all():
        errors = errors[:1, :1, :1]  # one number for all, and no copies of it
    rivals = STUCK * math.sqrt(2 * math.pi) / LATE * errors  # the density of a stuck run
    levels = np.log((1 - STUCK) + rivals)  # where a run is on the curve, so that nothing jumps there
    offsets = np.where(data.late & of_reached, levels, 0.0)
    usual = math.log(1 - STUCK)
    alike = float(rivals[0, 0, 0]) if rivals.size == 1 else None

    def own(table: NDArray[Any], rows: Rows) -> NDArray[Any]:
        """Of these rows; one table may stand for all, where only the starts differ."""
        return table[rows] if len(table) > 1 else table

    def evaluate(p: Array, rows: Rows) -> tuple[Array, Array, Array]:
        late, error = own(data.late, rows), own(errors, rows)
        value, slope = steps_model.log_steps(model, p, size)
        z = (own(data.log, rows) - value[..., None]) / error
        reached = None if all_reached else own(of_reached, rows)
        met = z if reached is None else np.where(reached, z, 0.0)
        root = np.sqrt(1 + met * met / SOFT**2)
        costs = SOFT**2 * (root - 1)
        weight = 1 / root
        behind = (late & (met > 0)).ravel().nonzero()[0]
        # As logaddexp(usual - square, ln rival), where exp underflows nothing that counts: a rival is far above that.
        on_curve = np.exp(usual - costs.take(behind))
        both = on_curve + (np.broadcast_to(own(rivals, rows), z.shape).take(behind) if alike is None else alike)
        costs -= own(offsets, rows)
        costs.put(behind, -np.log(both))
        weight.put(behind, weight.take(behind) * (on_curve / both))
        if reached is not None:
            weight = np.where(reached, weight, 0.0)
        force = weight * met
        cost = costs.sum((-2, -1))
        if any_censored:
            censored = own(of_censored, rows)
            at = np.where(censored, z, 0.0)
            log_survival = log_ndtr(-at)
            hazard = np.exp(-(at**2) / 2 - 0.5 * math.log(2 * math.pi) - log_survival)
            whole = np.logaddexp(usual + log_survival, math.log(STUCK))
            ordinary = np.where(late, np.exp(usual + log_survival - whole), 1.0)
            cost = cost - np.sum(np.where(censored, np.where(late, whole, log_survival), 0.0), (-2, -1))
            force = np.where(censored, ordinary * hazard, force)
            weight = np.where(censored, ordinary * hazard * (hazard - at), weight)
        pull, stiff = (force / error).sum(-1), (weight / error**2).sum(-1)
        normal = slope.swapaxes(-1, -2) @ (slope * stiff[..., None])
        return cost, (slope * pull[..., None]).sum(-2), normal

    return evaluate


def fit_model(model: str, size: Array, data: Cells) -> Fit:
    """The point estimate: the best of many starts, the error's size found in turn with the parameters."""
    kind, log = data.kind[0], data.log[0]
    counts = (kind > 0).sum(-1)
    seen = counts > 0
    level = np.array([np.median(row[own]) for row, own in zip(log[seen], kind[seen] > 0, strict=True)])
    p, sigma = steps_model.starts(model, size[seen], level), 0.1  # a usual spread between seeds, to begin with
    bounds = steps_model.limits(model, size)
    p, cost = minimize(p, evaluator(model, size, data, sigma), *bounds)
    p = p[[int(np.argmin(cost))]]
    variance = data.variance[0][kind == REACHED]
    for _ in range(4):
        before = sigma
        residual = (log - steps_model.log_steps(model, p, size)[0][0][:, None])[kind == REACHED]
        late = data.late[0][kind == REACHED]
        for _ in range(10):
            total = sigma**2 + variance
            soft = residual**2 / np.sqrt(1 + residual**2 / (SOFT**2 * total))
            weights = ordinary(residual, total, late) * total**-2
            own = float(np.average(soft - variance, weights=weights))  # what evaluations do not explain
            sigma = math.hypot(math.sqrt(max(own, 0.0)), RESOLUTION)
        p, cost = minimize(p, evaluator(model, size, data, sigma), *bounds)
        if abs(sigma - before) < SETTLED * sigma:
            break
    likelihood = float(np.sum(np.log(sigma**2 + variance))) + 2 * float(cost[0])
    return Fit(model, p[0], sigma, float(aicc(likelihood, data_points(counts.sum()), p.shape[-1])))
