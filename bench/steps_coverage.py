"""Do the intervals of `fit_steps` hold? Planted curves of steps, read through noise, gaps, stuck runs and evaluations.

    python bench/steps_coverage.py [--repeats 200] [--resamples 200] [--families hyperbola,...] [--readings plain,...]

For each family of curves and each way of reading it: the share of 95 % intervals that hold the true B_20, B_50, B_20 of
Zhang and B_stag (all by their definitions, from the true curve), and the median ratio of the upper to the lower end of
B_50's interval. Open ends hold everything beyond them and have no ratio. No device is measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from pybatch.fits.steps import fit_steps
from pybatch.records import StepsFit

BATCHES = 2.0 ** np.arange(3, 12)  # 8 to 2048
NOISE, SHARED = 0.05, 0.03  # log steps: of each run, and of a seed at all batch sizes
CAP = 40.0  # times the steps of the smallest batch
EVERY = 25  # steps between evaluations, where they are on a grid

Curve = Callable[[Any], Any]
CURVES: dict[str, Curve] = {
    "hyperbola": lambda b: 100 * (1 + 100 / b),
    "power 0.7": lambda b: 100 * (1 + (100 / b) ** 0.7),
    "power 1.5": lambda b: 100 * (1 + (100 / b) ** 1.5),
    "smooth 2": lambda b: 100 * (1 + (100 / b) ** 2) ** 0.5,
    "knee": lambda b: 100 * np.maximum(1, 100 / b),
    "u-turn": lambda b: 100 * (1 + 100 / b + b / 3000),
    "B^-0.5": lambda b: 5000 * b**-0.5,
    "B^-0.8": lambda b: 20000 * b**-0.8,
}


def truths(curve: Curve) -> dict[str, float]:
    """The figures of a curve by their definitions; infinite where there is none."""
    grid = np.geomspace(1e-6, 1e7, 40_001)
    examples = grid * curve(grid)
    # Where examples fall without end as batches do, the fewest are those of the smallest batch tested.
    endless = examples[0] < 0.7 * examples[grid >= BATCHES[0]].min()
    if endless:
        grid = np.geomspace(BATCHES[0], 1e7, 40_001)
        examples = grid * curve(grid)
    at, least = grid[int(np.argmin(examples))], float(examples.min())
    own = float(BATCHES[0] * curve(BATCHES[0]))

    def past(wanted: float, start: float) -> float:
        return float(brentq(lambda log: math.exp(log) * curve(math.exp(log)) / wanted - 1, math.log(start), 25))

    saved = curve(2 * grid) / curve(grid)
    stagnant = grid[saved >= 0.9]
    return {
        "b20": math.exp(past(1.2 * least, at)),
        "b50": math.exp(past(2 * least, at)),
        "b20_zhang": math.exp(past(1.2 * own, max(at, BATCHES[0]))),
        "b_stag": float(stagnant[0]) if len(stagnant) else math.inf,
    }


def runs(curve: Curve, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """True steps [n, seeds] at BATCHES, not whole."""
    error = NOISE * rng.standard_normal((len(BATCHES), seeds)) + SHARED * rng.standard_normal((1, seeds))
    return curve(BATCHES)[:, None] * np.exp(error)


def plain(curve: Curve, rng: np.random.Generator, seeds: int = 3) -> tuple[np.ndarray, dict[str, Any]]:
    return np.maximum(1, np.round(runs(curve, seeds, rng))), {}


def alone(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    return plain(curve, rng, 1)


def few(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Three seeds at every second batch size from the second on."""
    steps, options = plain(curve, rng)
    return np.where(np.isin(np.arange(len(BATCHES)), (1, 3, 5, 7))[:, None], steps, math.nan), options


def few_alone(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """One seed at five batch sizes in a row."""
    steps, options = alone(curve, rng)
    return np.where(np.isin(np.arange(len(BATCHES)), range(1, 6))[:, None], steps, math.nan), options


def stuck(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """One run in 27 is late by 2 to 100 times, half of these never reach."""
    steps, _ = plain(curve, rng)
    late = rng.random(steps.shape) < 1 / 27
    steps = np.where(late, np.round(steps * np.exp(rng.uniform(math.log(2), math.log(100), steps.shape))), steps)
    cap = CAP * float(curve(BATCHES[0]))
    steps = np.where((late & (rng.random(steps.shape) < 0.5)) | (steps > cap), math.inf, steps)
    return steps, {"cap": cap}


def ragged(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """From 2 to 10 runs a batch size."""
    steps, _ = plain(curve, rng, 10)
    kept = rng.integers(2, 11, len(BATCHES))
    return np.where(np.arange(10) < kept[:, None], steps, math.nan), {}


def grid(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """The first evaluation at or past the target, every EVERY steps."""
    return np.ceil(runs(curve, 3, rng) / EVERY) * EVERY, {}


def known_grid(curve: Curve, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    steps, _ = grid(curve, rng)
    return steps, {"before": steps - EVERY}


READINGS = {
    "plain": plain,
    "one seed": alone,
    "4 sizes": few,
    "5 alone": few_alone,
    "stuck": stuck,
    "ragged": ragged,
    "grid": grid,
    "before=": known_grid,
}
ENDS = {
    "b20": ("b20_low", "b20_high"),
    "b50": ("low", "high"),
    "b20_zhang": ("b20_zhang_low", "b20_zhang_high"),
    "b_stag": ("b_stag_low", "b_stag_high"),
}


def holds(fit: StepsFit, figure: str, truth: float) -> bool:
    low, high = (getattr(fit, name) for name in ENDS[figure])
    return (low or 0.0) <= truth * (1 + 1e-9) and truth <= (math.inf if high is None else high * (1 + 1e-9))


def coverage(family: str, reading: str, repeats: int, resamples: int) -> dict[str, Any]:
    """One row: shares of intervals that hold, the median ratio of the ends of B_50, and how often each model won."""
    curve, rng = CURVES[family], np.random.default_rng(0)
    truth, held, wide, models, missing = truths(curve), dict.fromkeys(ENDS, 0), [], {}, 0
    for seed in range(repeats):
        steps, options = READINGS[reading](curve, rng)
        fit = fit_steps(BATCHES, steps, seed=seed, resamples=resamples, **options)
        models[str(fit.model)] = models.get(str(fit.model), 0) + 1
        missing += fit.model is None
        for figure in ENDS:
            held[figure] += holds(fit, figure, truth[figure])
        if fit.low and fit.high:
            wide.append(fit.high / fit.low)
    shares = {figure: count / repeats for figure, count in held.items()}
    ratio = float(np.median(wide)) if wide else None
    return {"family": family, "reading": reading, **shares, "ratio": ratio, "models": models, "truth": truth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--families", default=",".join(CURVES))
    parser.add_argument("--readings", default=",".join(READINGS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'curve':10} {'read':9}  B_20   B_50  Zhang  B_stag  ratio of B_50's ends")
    for family in given.families.split(","):
        for reading in given.readings.split(","):
            row = coverage(family, reading, given.repeats, given.resamples)
            rows.append(row)
            figures = "  ".join(f"{100 * row[name]:3.0f} %" for name in ENDS)
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else "open"
            most = max(row["models"], key=row["models"].__getitem__)
            print(f"{family:10} {reading:9} {figures}  {ratio}  ({most} {row['models'][most]})", flush=True)
    for figure in ENDS:
        print(f"{figure}: {100 * np.mean([row[figure] for row in rows]):.1f} % held in all")
    if given.output is not None:
        given.output.write_text(json.dumps({"repeats": given.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
