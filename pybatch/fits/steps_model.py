"""Models of steps to target against batch size S(B), and the critical batches that follow from each by definition.

    flat       S                                     more batch saves no steps
    inverse    a / B                                 perfect scaling
    power-law  c B^-alpha                            no bend: each doubling saves the same share of the steps
    hyperbola  S_min (1 + B_c / B)                   McCandlish et al. 2018, eq. 2.11
    power      S_min (1 + (B_c / B)^alpha)
    smooth     S_min (1 + (B_c / B)^p)^(1/p)         a sharper or a softer bend
    u-turn     S_min (1 + B_c / B + B / B_k)         hyperbola + k B: large batches need more steps again

B_min is the batch of the fewest examples E = B S(B); B_f, past it, the one that needs f times as many; B_stag the one
whose doubling saves less than 10 % of the steps. On the hyperbola B_f is (f - 1) B_c and B_stag 4 B_c. Beside B_20
stands what Zhang et al. 2024 call the critical batch: 20 % over the examples of the smallest batch tested, B_0, which
is 0.2 B_c + 1.2 B_0 on the hyperbola.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pybatch.fits.solver import Array

NAMES: dict[str, tuple[str, ...]] = {
    "flat": ("s_min",),
    "inverse": ("examples",),
    "power-law": ("steps_at_1", "alpha"),
    "hyperbola": ("s_min", "b_c"),
    "power": ("s_min", "b_c", "alpha"),
    "smooth": ("s_min", "b_c", "p"),
    "u-turn": ("s_min", "b_c", "b_k"),
}
MODELS = tuple(NAMES)

SAVED = 0.9  # S(2B) / S(B) at the stagnant batch: a doubling there saves 10 % of the steps
SLOPES = (0.02, 6.0)  # of the power law; a smaller one is flat
EXPONENTS = (1 / 3, 6.0)  # of power; outside, a curve over a few decades of batches is one of the others
SHARPNESS = (1 / 3, 30.0)  # of smooth: from the last on, its B_20 and B_stag are those of a kink to 1 %
REACH = 1e3  # critical batches are sought within this factor of those tested; beyond, the data say nothing
FIGURES = ("s_min", "b20", "b50", "b_stag", "b20_zhang", "b_min")
_HALVINGS = 50


def log_steps(model: str, p: Array, size: Array) -> tuple[Array, Array]:
    """ln S [R, n] and its Jacobian [R, n, P], at log-parameters [R, P] and batch sizes [n]."""
    first = p[:, 0:1]
    slope = np.ones((len(p), len(size), p.shape[1]))  # by the first parameter it is 1
    if model == "flat":
        return first * slope[..., 0], slope
    log_size = np.log(size)
    if model == "inverse":
        return first - log_size, slope
    if model == "power-law":
        alpha = np.exp(p[:, 1:2])
        slope[..., 1] = -alpha * log_size
        return first - alpha * log_size, slope
    u = p[:, 1:2] - log_size
    if model == "hyperbola":
        slope[..., 1] = _logistic(u)
        return first + np.logaddexp(0, u), slope
    if model == "u-turn":
        turn = log_size - p[:, 2:3]
        total = np.logaddexp(np.logaddexp(0, u), turn)
        slope[..., 1], slope[..., 2] = np.exp(u - total), -np.exp(turn - total)
        return first + total, slope
    power = np.exp(p[:, 2:3])
    u = power * u
    bent, share = np.logaddexp(0, u), _logistic(u)
    if model == "power":
        slope[..., 1], slope[..., 2] = share * power, share * u
        return first + bent, slope
    slope[..., 1], slope[..., 2] = share, (share * u - bent) / power
    return first + bent / power, slope


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
    if model == "power-law":
        low[1], high[1] = np.log(SLOPES)
    elif len(low) > 1:
        low[1], high[1] = np.log(size.min() / REACH), np.log(size.max() * REACH)
    if model == "u-turn":
        low[2], high[2] = np.log(size.min()), np.log(size.max() * REACH)
    elif len(low) > 2:
        low[2], high[2] = np.log(SHARPNESS if model == "smooth" else EXPONENTS)
    return low, high


def starts(model: str, size: Array, level: Array) -> Array:
    """Starting points [S, P] over all decades of the nonlinear parameters; `level` [n] is ln S, about."""
    if model == "flat":
        return np.array([[level.mean()]])
    if model == "inverse":
        return np.array([[(level + np.log(size)).mean()]])
    if model == "power-law":
        slopes = np.log(np.array([0.1, 0.3, 0.6, 1.0, 2.0]))
        return np.stack([[np.median(level + np.exp(slope) * np.log(size)) for slope in slopes], slopes], -1)
    low, high = limits(model, size)
    bends = np.linspace(np.log(size.min() / 30), np.log(size.max() * 30), 13)
    thirds = {"power": np.log([0.6, 1.0, 2.0]), "smooth": np.log([0.6, 1.0, 3.0, 10.0])}
    third = thirds.get(model, np.linspace(np.log(size.max() / 4), high[-1], 4))
    grid: Array = np.stack(np.meshgrid(0.0, bends, third), -1).reshape(-1, 3)[:, : len(low)]
    grid = np.clip(np.unique(grid, axis=0), low, high)
    grid[:, 0] = np.median(level - log_steps(model, grid, size)[0], axis=1)
    return grid


def figures(model: str, p: Array, least: float, most: float) -> Array:
    """The figures of FIGURES [R, 6] at log-parameters [R, P], for batch sizes tested from `least` to `most`.

    The fewest examples are those of the model's infimum over batches. Where examples fall without end as batches do
    (alpha < 1) there is none above 0: there they are those of the smallest batch tested. A batch that does not exist is
    infinite, or 0 for the flat model: every batch is stagnant. B_min is sought among the batches tested; it is nan
    where all take as many examples.
    """
    one, first = np.ones(len(p)), np.exp(p[:, 0])
    nan, never = np.full(len(p), np.nan), np.full(len(p), np.inf)
    if model == "flat":
        return np.stack([first, 0 * one, 0 * one, 0 * one, 1.2 * least * one, least * one], -1)
    if model == "inverse":
        return np.stack([0 * one, never, never, never, never, nan], -1)
    bend = np.exp(p[:, 1])
    if model == "power-law":
        falls = bend < 1  # here the exponent; examples then rise with the batch, as B^(1 - alpha)
        with np.errstate(over="ignore"):
            past = [np.where(falls, least * f ** (1 / np.where(falls, 1 - bend, 1.0)), np.inf) for f in (1.2, 2.0)]
        stagnant = np.where(0.5**bend < SAVED, np.inf, 0.0)
        return np.stack([0 * one, *past, stagnant, past[0], np.where(falls, least, most)], -1)
    smallest = least * one
    if model == "hyperbola":
        return np.stack([first, 0.2 * bend, bend, 4 * bend, 0.2 * bend + 1.2 * least, smallest], -1)
    if model == "u-turn":
        turn = np.exp(p[:, 2])
        fewest = first * (1 + 2 * np.sqrt(bend / turn))  # steps, at B = sqrt(B_c B_k)
        own = bend + least + least**2 / turn  # examples of the smallest batch, over S_min
        found = [
            *(_root(1 / turn, 1.0, -(f - 1) * bend) for f in (1.2, 2.0)),
            _root((2 - SAVED) / turn, 1 - SAVED, -(SAVED - 0.5) * bend),
            _root(1 / turn, 1.0, bend - 1.2 * own),
        ]
        return np.stack([fewest, *found, smallest], -1)
    power = np.exp(p[:, 2])
    if model == "smooth":
        factors = [bend * (f**power - 1) ** (1 / power) for f in (1.2, 2.0)]
        stagnant = bend * ((SAVED**power - 0.5**power) / (1 - SAVED**power)) ** (1 / power)
        own = (least / bend) ** power + 1
        zhang = bend * (1.2**power * own - 1) ** (1 / power)
        return np.stack([first, *factors, stagnant, zhang, smallest], -1)
    slow = 0.5**power < SAVED  # else a doubling never saves 10 %
    share = np.where(slow, (1 - SAVED) / np.where(slow, SAVED - 0.5**power, 1.0), np.inf)
    stagnant = bend * share ** (-1 / power)
    inner = bend * np.maximum(power - 1, 0.0) ** (1 / power)  # where dE/dB = 0, for alpha > 1
    from_fewest = np.where(power < 1, least, inner)
    found = [_power_batch(f, bend, power, from_fewest) for f in (1.2, 2.0)]
    zhang = _power_batch(1.2, bend, power, smallest, np.maximum(inner, least))
    return np.stack([first, *found, stagnant, zhang, np.clip(inner, least, most)], -1)


def steep(model: str, p: Array, saved: float) -> Array:
    """Batch [R] up to which a doubling leaves less than the share `saved` < 1/2 of the steps, at log-parameters [R, P];
    0 where none does, infinite where every one does."""
    none = np.zeros(len(p))
    if model == "power-law":
        return np.where(0.5 ** np.exp(p[:, 1]) < saved, np.inf, none)
    if model != "power":  # of the others steps fall as 1 / B at most
        return none
    power = np.exp(p[:, 2])
    beyond = saved - 0.5**power
    ratio = (1 - saved) / np.where(beyond > 0, beyond, 1.0)  # (B_c / B)^alpha there
    return np.where(beyond > 0, np.exp(p[:, 1]) * ratio ** (-1 / power), none)


def _logistic(u: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-np.minimum(np.maximum(u, -700), 700)))
    return result


def _root(a: Array, b: float, c: Array) -> Array:
    """The positive root of a x^2 + b x + c for a > 0 > c, without cancellation."""
    root: Array = -2 * c / (b + np.sqrt(b * b - 4 * a * c))
    return root


def _power_batch(factor: float, bend: Array, power: Array, start: Array, past: Array | None = None) -> Array:
    """Batch, not below `past`, that needs `factor` times the examples B + B_c^alpha B^(1 - alpha) of batch `start`.

    A start of 0 stands for the infimum there, which alpha = 1 alone has: E = B_c.
    """

    def log_examples(log_batch: Array) -> Array:
        total: Array = log_batch + np.logaddexp(0, power * (np.log(bend) - log_batch))
        return total

    with np.errstate(divide="ignore", invalid="ignore"):
        log_start = np.where(start > 0, np.log(start), -np.inf)
        wanted = np.log(factor) + np.where(start > 0, log_examples(log_start), np.log(bend))
    low = np.where(start > 0, log_start, np.log(bend) - 30)
    low = low if past is None else np.log(past)
    high = np.maximum(wanted, low) + 1.0  # E(B) > B
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = log_examples(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    result: Array = np.exp((low + high) / 2)
    return result
