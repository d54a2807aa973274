"""The likelihood of steps to target under one model, its best fit, and by what models are compared.

Errors are normal in log steps, with tails that count linearly; see `steps` for what counts how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from pybatch.fits import steps_model
from pybatch.fits.solver import Array, Evaluate, aicc, minimize
from pybatch.fits.steps_data import CENSORED, REACHED, Cells

SOFT = 3.0  # standard deviations from which on a residual counts linearly
RESOLUTION = 2e-3  # log steps: steps are whole numbers, and a perfect fit must not drive AICc to minus infinity
LEAST_THREE = 5  # batch sizes for a model of three unknowns
FEW = 5  # runs up to which AICc has no correction, or one of 20 against any bend: models are compared without it
SUPPORT = 4.0  # of AICc: within it the hyperbola has support and stands (Burnham and Anderson 2002, section 2.6)


@dataclass(frozen=True)
class Fit:
    """The best parameters of one model."""

    model: str
    p: Array  # [P]
    sigma: float  # of the error in log steps
    score: float  # AICc


def candidates(reached: int, runs: int) -> list[str]:
    """The models that so many batch sizes, and runs, that reached the target can tell apart."""
    three = reached >= LEAST_THREE and runs > FEW
    return [name for name, unknowns in steps_model.NAMES.items() if len(unknowns) < 3 or three]


def handicap(model: str) -> float:
    """What a model of three unknowns must do better, by AICc. Runs of one seed, and seeds of one batch size, err
    together, so that AICc sees more data than there are, and a third unknown moves B_50 by half for nothing."""
    return SUPPORT if len(steps_model.NAMES[model]) > 2 else 0.0


def data_points(runs: Any) -> Any:
    """Data points for AICc, infinite where they are so few that its correction would leave no model with a bend."""
    return np.where(np.asarray(runs) > FEW, runs, np.inf)


def evaluator(model: str, size: Array, data: Cells, sigma: float) -> Evaluate:
    """Minus log likelihood, without its ln sigma, as `minimize` wants it."""
    reached, censored = data.kind == REACHED, data.kind == CENSORED
    any_censored = bool(censored.any())
    error = np.sqrt(sigma**2 + data.variance)

    def evaluate(p: Array) -> tuple[Array, Array, Array]:
        value, slope = steps_model.log_steps(model, p, size)
        z = (data.log - value[..., None]) / error
        root = np.sqrt(1 + (z / SOFT) ** 2)
        cost = np.sum(np.where(reached, SOFT**2 * (root - 1), 0.0), (-2, -1))
        force = np.where(reached, z / root, 0.0)
        weight = np.where(reached, 1 / root, 0.0)
        if any_censored:
            at = np.where(censored, z, 0.0)
            log_survival = log_ndtr(-at)
            hazard = np.exp(-(at**2) / 2 - 0.5 * math.log(2 * math.pi) - log_survival)
            cost = cost - np.sum(np.where(censored, log_survival, 0.0), (-2, -1))
            force = np.where(censored, hazard, force)
            weight = np.where(censored, hazard * (hazard - at), weight)
        pull, stiff = (force / error).sum(-1), (weight / error**2).sum(-1)
        normal = np.swapaxes(slope, -1, -2) @ (slope * stiff[..., None])
        return cost, np.sum(slope * pull[..., None], -2), normal

    return evaluate


def fit_model(model: str, size: Array, data: Cells) -> Fit:
    """The point estimate: the best of many starts, the error's size found in turn with the parameters."""
    kind, log = data.kind[0], data.log[0]
    counts = (kind > 0).sum(-1)
    seen = counts > 0
    level = log[seen].sum(-1) / counts[seen]
    p, sigma = steps_model.starts(model, size[seen], level), 0.1  # a usual spread between seeds, to begin with
    bounds = steps_model.limits(model, size)
    p, cost = minimize(p, evaluator(model, size, data, sigma), *bounds)
    p = p[[int(np.argmin(cost))]]
    variance = data.variance[0][kind == REACHED]
    for _ in range(4):
        residual = (log - steps_model.log_steps(model, p, size)[0][0][:, None])[kind == REACHED]
        for _ in range(10):
            total = sigma**2 + variance
            soft = residual**2 / np.sqrt(1 + residual**2 / (SOFT**2 * total))
            own = float(np.average(soft - variance, weights=total**-2))  # what evaluations do not explain
            sigma = math.hypot(math.sqrt(max(own, 0.0)), RESOLUTION)
        p, cost = minimize(p, evaluator(model, size, data, sigma), *bounds)
    likelihood = float(np.sum(np.log(sigma**2 + variance))) + 2 * float(cost[0])
    return Fit(model, p[0], sigma, float(aicc(likelihood, data_points(counts.sum()), p.shape[-1])))
