"""Levenberg-Marquardt on many small problems at once: every row is one data set, all rows share one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Evaluate = Callable[[Array], tuple[Array, Array, Array]]

_LONGEST = 2.0  # of one step in a log-parameter: farther than that, the linearization says nothing


def minimize(p: Array, evaluate: Evaluate, low: Array, high: Array, rounds: int = 60) -> tuple[Array, Array]:
    """Polish each row of p towards its least cost.

    Args:
        p: [R, P] starting points, in log-parameters.
        evaluate: parameters [R, P] -> cost [R], force [R, P] (minus the gradient), normal matrix [R, P, P].
        low, high: [P] bounds, to which steps are clipped.
        rounds: most steps.

    Returns:
        Parameters [R, P] and cost [R].
    """
    damping = np.full(len(p), 1e-3)
    cost, force, normal = evaluate(p)
    eye = np.eye(p.shape[-1])
    idle = 0
    for _ in range(rounds):
        ridge = damping[:, None] * (np.diagonal(normal, axis1=-2, axis2=-1) + 1e-9)
        step = np.linalg.solve(normal + ridge[..., None] * eye, force[..., None])[..., 0]
        trial = np.clip(p + np.clip(step, -_LONGEST, _LONGEST), low, high)
        trial_cost, trial_force, trial_normal = evaluate(trial)
        better = trial_cost < cost
        idle = 0 if bool(np.any(trial_cost < cost * (1 - 1e-7))) else idle + 1
        p = np.where(better[:, None], trial, p)
        force = np.where(better[:, None], trial_force, force)
        normal = np.where(better[:, None, None], trial_normal, normal)
        cost = np.where(better, trial_cost, cost)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e9)
        if idle == 4:  # damping has grown 600-fold and no row moved: all have arrived
            break
    return p, cost


def aicc(minus_two_log_likelihood: float | Array, n: Any, parameters: int) -> Any:
    """Akaike's criterion, corrected for few points (Hurvich and Tsai 1989). Lower is better.

    Args:
        minus_two_log_likelihood: of the fit.
        n: data points; infinite for the criterion without its correction.
        parameters: unknowns of the curve; the error's size is counted as one more.

    Infinite for a model with too many unknowns for the points: without a correction it would beat smaller ones that
    have theirs.
    """
    k = parameters + 1
    rest = np.asarray(n, dtype=np.float64) - k - 1
    return (
        minus_two_log_likelihood + 2 * k + np.where(rest > 0, 2 * k * (k + 1) / np.where(rest > 0, rest, 1.0), np.inf)
    )
