"""Models of steps to target against batch size S(B), and the critical batches that follow from each by definition.

    flat       S                                     more batch saves no steps
    inverse    a / B                                 perfect scaling
    hyperbola  S_min (1 + B_c / B)                   McCandlish et al. 2018, eq. 2.11
    power      S_min (1 + (B_c / B)^alpha)
    smooth     S_min (1 + (B_c / B)^p)^(1/p)         a sharper or a softer bend
    u-turn     S_min (1 + B_c / B + B / B_k)         hyperbola + k B: large batches need more steps again

B_f is the batch that needs f times the fewest examples E = B S(B); B_stag the one whose doubling saves less than 10 %
of the steps. On the hyperbola they are (f - 1) B_c and 4 B_c.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pybatch.fits.solver import Array

NAMES: dict[str, tuple[str, ...]] = {
    "flat": ("s_min",),
    "inverse": ("examples",),
    "hyperbola": ("s_min", "b_c"),
    "power": ("s_min", "b_c", "alpha"),
    "smooth": ("s_min", "b_c", "p"),
    "u-turn": ("s_min", "b_c", "b_k"),
}
MODELS = tuple(NAMES)

SAVED = 0.9  # S(2B) / S(B) at the stagnant batch: a doubling there saves 10 % of the steps
EXPONENTS = (1 / 3, 6.0)  # of power and smooth; outside, a curve over a few decades of batches is one of the others
REACH = 1e3  # critical batches are sought within this factor of those tested; beyond, the data say nothing
_HALVINGS = 50


def log_steps(model: str, p: Array, size: Array) -> tuple[Array, Array]:
    """ln S [R, n] and its Jacobian [R, n, P], at log-parameters [R, P] and batch sizes [n]."""
    first = p[:, 0:1]
    one = np.ones((len(p), len(size)))
    if model == "flat":
        return first * one, one[..., None]
    log_size = np.log(size)
    if model == "inverse":
        return first - log_size, one[..., None]
    u = p[:, 1:2] - log_size
    if model == "hyperbola":
        return first + np.logaddexp(0, u), np.stack([one, _logistic(u)], -1)
    if model == "u-turn":
        turn = log_size - p[:, 2:3]
        total = np.logaddexp(np.logaddexp(0, u), turn)
        return first + total, np.stack([one, np.exp(u - total), -np.exp(turn - total)], -1)
    power = np.exp(p[:, 2:3])
    u = power * u
    bent, share = np.logaddexp(0, u), _logistic(u)
    if model == "power":
        return first + bent, np.stack([one, share * power, share * u], -1)
    return first + bent / power, np.stack([one, share, (share * u - bent) / power], -1)


def predicted(model: str, parameters: Mapping[str, float], batch: float) -> float:
    """Steps at a batch size by a fitted model, from the `model` and `parameters` of a `StepsFit`."""
    return float(predicted_all(model, parameters, np.array([float(batch)]))[0])


def predicted_all(model: str, parameters: Mapping[str, float], batches: Array) -> Array:
    """As `predicted`, for batch sizes [...] at once."""
    p = np.log([[parameters[name] for name in NAMES[model]]])
    found: Array = np.exp(log_steps(model, p, np.ravel(batches))[0][0]).reshape(np.shape(batches))
    return found


def limits(model: str, size: Array) -> tuple[Array, Array]:
    """Bounds [P] of the log-parameters for batch sizes [n]."""
    low, high = np.full(len(NAMES[model]), -np.inf), np.full(len(NAMES[model]), np.inf)
    if len(low) > 1:
        low[1], high[1] = np.log(size.min() / REACH), np.log(size.max() * REACH)
    if model == "u-turn":
        low[2], high[2] = np.log(size.min()), np.log(size.max() * REACH)
    elif len(low) > 2:
        low[2], high[2] = np.log(EXPONENTS)
    return low, high


def starts(model: str, size: Array, level: Array) -> Array:
    """Starting points [S, P] over all decades of the nonlinear parameters; `level` [n] is ln S, about."""
    if model == "flat":
        return np.array([[level.mean()]])
    if model == "inverse":
        return np.array([[(level + np.log(size)).mean()]])
    low, high = limits(model, size)
    bends = np.linspace(np.log(size.min() / 30), np.log(size.max() * 30), 13)
    thirds = {"power": np.log([0.6, 1.0, 2.0]), "smooth": np.log([0.6, 1.0, 3.0])}
    third = thirds.get(model, np.linspace(np.log(size.max() / 4), high[-1], 4))
    grid: Array = np.stack(np.meshgrid(0.0, bends, third), -1).reshape(-1, 3)[:, : len(low)]
    grid = np.clip(np.unique(grid, axis=0), low, high)
    grid[:, 0] = np.median(level - log_steps(model, grid, size)[0], axis=1)
    return grid


def figures(model: str, p: Array, least: float) -> Array:
    """S_min, B_20, B_50 and B_stag [R, 4] at log-parameters [R, P].

    The fewest examples are those of the model's infimum over batches. The power model with alpha < 1 has none above
    0: there they are those of the smallest batch tested, `least`. A batch that does not exist is infinite, or 0 for
    the flat model: every batch is stagnant.
    """
    first = np.exp(p[:, 0])
    if model == "flat":
        return np.stack([first, *np.zeros((3, len(p)))], -1)
    if model == "inverse":
        return np.stack([np.zeros(len(p)), *np.full((3, len(p)), np.inf)], -1)
    bend = np.exp(p[:, 1])
    if model == "hyperbola":
        return np.stack([first, 0.2 * bend, bend, 4 * bend], -1)
    if model == "u-turn":
        turn = np.exp(p[:, 2])
        fewest = first * (1 + 2 * np.sqrt(bend / turn))  # at B = sqrt(B_c B_k)
        return np.stack(
            [
                fewest,
                *(_root(1 / turn, 1.0, -(f - 1) * bend) for f in (1.2, 2.0)),
                _root((2 - SAVED) / turn, 1 - SAVED, -(SAVED - 0.5) * bend),
            ],
            -1,
        )
    power = np.exp(p[:, 2])
    if model == "smooth":
        factors = [bend * (f**power - 1) ** (1 / power) for f in (1.2, 2.0)]
        stagnant = bend * ((SAVED**power - 0.5**power) / (1 - SAVED**power)) ** (1 / power)
        return np.stack([first, *factors, stagnant], -1)
    slow = 0.5**power < SAVED  # else a doubling never saves 10 %
    share = np.where(slow, (1 - SAVED) / np.where(slow, SAVED - 0.5**power, 1.0), np.inf)
    stagnant = bend * share ** (-1 / power)
    return np.stack([first, *(_power_batch(f, bend, power, least) for f in (1.2, 2.0)), stagnant], -1)


def _logistic(u: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-np.clip(u, -700, 700)))
    return result


def _root(a: Array, b: float, c: Array) -> Array:
    """The positive root of a x^2 + b x + c for a > 0 > c, without cancellation."""
    root: Array = -2 * c / (b + np.sqrt(b * b - 4 * a * c))
    return root


def _power_batch(factor: float, bend: Array, power: Array, least: float) -> Array:
    """Batch that needs `factor` times the fewest examples B + B_c^alpha B^(1 - alpha), past the batch of fewest."""
    inner = bend * np.maximum(power - 1, 0.0) ** (1 / power)  # where dE/dB = 0, for alpha > 1
    fewest_at = np.where(power < 1, least, inner)

    def log_examples(log_batch: Array) -> Array:
        total: Array = log_batch + np.logaddexp(0, power * (np.log(bend) - log_batch))
        return total

    with np.errstate(divide="ignore", invalid="ignore"):
        start = np.where(fewest_at > 0, np.log(fewest_at), -np.inf)
        # alpha = 1 has its infimum at B = 0: E = B_c.
        wanted = np.log(factor) + np.where(fewest_at > 0, log_examples(start), np.log(bend))
    low = np.where(fewest_at > 0, start, np.log(bend) - 30)
    high = wanted + 1.0  # E(B) > B
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = log_examples(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    result: Array = np.exp((low + high) / 2)
    return result
