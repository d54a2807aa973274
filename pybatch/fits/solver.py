"""Levenberg-Marquardt on many small problems at once: every row is one data set, all rows share one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = slice | NDArray[np.intp]
Evaluate = Callable[[Array, Rows], tuple[Array, Array, Array]]

_LONGEST = 2.0  # of one step in a log-parameter: farther than that, the linearization says nothing
_GAINED = 1e-7  # of a row's cost, that counts as progress
_IDLE = 4  # rounds without any, none of whose steps was too long: the row has arrived
_DAMPED = 0.5  # times the diagonal: from here on a step that fails was not too long
_REJECTED = 1e-3  # damping at least, after a step that was too long


def minimize(p: Array, evaluate: Evaluate, low: Array, high: Array, rounds: int = 60) -> tuple[Array, Array]:
    """Polish each row of p towards its least cost; a row that has arrived is looked at no more.

    Args:
        p: [R, P] starting points, in log-parameters.
        evaluate: parameters [r, P] of some of the rows, and which -> cost [r], force [r, P] (minus the gradient) and
            normal matrix [r, P, P].
        low, high: [P] or [R, P] bounds, to which steps are clipped.
        rounds: most steps.

    Returns:
        Parameters [R, P] and cost [R].
    """
    found, least = p.copy(), np.empty(len(p))
    rows, count = np.arange(len(p)), p.shape[-1]
    looked_at: Rows = slice(None)  # views, while all are
    low, high = np.broadcast_to(low, p.shape), np.broadcast_to(high, p.shape)
    damping, idle = np.full(len(p), 1e-3), np.zeros(len(p), dtype=int)
    cost, force, normal = evaluate(p, looked_at)
    for _ in range(rounds):
        damped = normal.copy()
        diagonal = damped.reshape(-1, count * count)[:, :: count + 1]
        diagonal += damping[:, None] * (diagonal + 1e-9)
        step: NDArray[Any] = np.linalg.solve(damped, force[..., None])[..., 0]
        trial = _clipped(p + _clipped(step, -_LONGEST, _LONGEST), low, high)
        trial_cost, trial_force, trial_normal = evaluate(trial, looked_at)
        better = trial_cost < cost
        idle += better | (damping >= _DAMPED)
        idle[trial_cost < cost * (1 - _GAINED)] = 0
        damping = _clipped(np.where(better, damping / 5, np.maximum(damping * 5, _REJECTED)), 1e-9, 1e9)
        if better.all():
            p, cost, force, normal = trial, trial_cost, trial_force, trial_normal
        elif better.any():
            p = np.where(better[:, None], trial, p)
            force = np.where(better[:, None], trial_force, force)
            normal = np.where(better[:, None, None], trial_normal, normal)
            cost = np.where(better, trial_cost, cost)
        on = idle < _IDLE
        if not on.all():
            found[rows], least[rows] = p, cost
            rows, p, cost, force, normal = rows[on], p[on], cost[on], force[on], normal[on]
            damping, idle, low, high = damping[on], idle[on], low[on], high[on]
            if not len(rows):
                break
            looked_at = rows
    found[rows], least[rows] = p, cost
    return found, least


def _clipped(values: NDArray[Any], low: Array | float, high: Array | float) -> Array:
    """As np.clip, which takes a few times as long for arrays as small as these."""
    clipped: Array = np.minimum(np.maximum(values, low), high)
    return clipped


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
