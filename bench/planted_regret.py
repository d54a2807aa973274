"""Regret of the verdict on planted truths: steps and step times known, both seen through noise.

    python bench/planted_regret.py [--repeats 40] [--noise 0.05] [--output FILE]

A truth is a curve of steps and a curve of step times. A sweep of three seeds and a timing of every batch size are
drawn from it, `compare` advises a batch, and regret is the true time to the target there over the least of
all batch sizes, swept or not. Each truth is drawn many times: `moved` is how many doublings apart two draws' advice lies, on average.
No device is measured, so load doesn't matter.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pybatch.answer.verdict import advise
from pybatch.fits.steps import fit_steps
from pybatch.fits.throughput import fit_throughput
from pybatch.records import BatchPoint, Capacity, Convergence, ConvergencePoint, Curve

SWEPT = 2 ** np.arange(2, 11)  # 4 to 1024
TIMED = 2 ** np.arange(0, 13)  # 1 to 4096
EVERY = np.unique(np.round(np.geomspace(1, 1e5, 20_000)))  # all that may be advised, 1 % apart at most
SEEDS, RESAMPLES = 3, 20  # resamples set intervals alone, which regret does not see
GOAL = 1.05
WITHIN = 0.01  # relative error that the interval of a step time knows of; drift between batch sizes comes on top

Array = np.ndarray
Curves = dict[str, Callable[[Array], Array]]

STEPS: Curves = {
    "hyperbola 30": lambda b: 200 * (1 + 30 / b),
    "hyperbola 170": lambda b: 30 * (1 + 170 / b),
    "hyperbola 900": lambda b: 100 * (1 + 900 / b),
    "power 0.7": lambda b: 30 * (1 + (150 / b) ** 0.7),
    "smooth 2": lambda b: 100 * (1 + (200 / b) ** 2) ** 0.5,
    "u-turn": lambda b: 50 * (1 + 60 / b + b / 2000),
}
TIMES: Curves = {
    "affine 100": lambda b: 1e-3 * (1 + b / 100),
    "floor 64": lambda b: 1e-3 * np.maximum(1, b / 64),
    "waves 48": lambda b: 1e-3 * (0.5 + np.ceil(b / 48)),
    "cache": lambda b: 1e-3 * (1 + b / 200 * np.where(b > 128, 1.5, 1.0)),
    "sublinear": lambda b: 1e-3 * (0.3 + (b / 30) ** 0.75),
}


def timed(times: Array, noise: float, rng: np.random.Generator) -> Capacity:
    """What a capacity measurement may record of these step times at TIMED."""
    seen = times * np.exp(0.5 * noise * rng.standard_normal(len(times)))  # drift from one batch size to another
    low, high = seen * (1 - 2 * WITHIN), seen * (1 + 2 * WITHIN)
    samples = seen[:, None] * np.exp(WITHIN * rng.standard_normal((len(seen), 10)))
    fit = fit_throughput(TIMED, samples, resamples=RESAMPLES)
    points = tuple(
        BatchPoint(int(b), "ok", 1e3 * t, 1e3 * lo, 1e3 * hi, samples=10)
        for b, t, lo, hi in zip(TIMED, seen, low, high, strict=True)
    )
    return Capacity(
        t0_ms=1e3 * fit.t0_s,
        ceiling_samples_per_s=fit.ceiling,
        half_batch=fit.half_batch,
        saturation_batch=fit.saturation_batch,
        saturation_low=fit.saturation_low,
        saturation_high=fit.saturation_high,
        saturation_measured=None,
        max_batch=100_000,
        max_batch_verified=True,
        model=fit,
        batches=points,
    )


def swept(steps: Array, noise: float, rng: np.random.Generator) -> Convergence:
    """What a sweep of SEEDS seeds may record of these steps at SWEPT."""
    table = np.maximum(1, np.round(steps[:, None] * np.exp(noise * rng.standard_normal((len(steps), SEEDS)))))
    found = fit_steps(SWEPT, table, cap=1e6, resamples=RESAMPLES)
    reached = tuple(
        ConvergencePoint(int(b), float(np.median(row)), "reached", SEEDS, 0.1, reached=SEEDS)
        for b, row in zip(SWEPT, table, strict=True)
    )
    curve = Curve("tuned", "train", reached, found.s_min, found.critical_batch, found.low, found.high, 0.1, fit=found)
    return Convergence((curve,), seeds=SEEDS)


def regrets(repeats: int, noise: float) -> list[dict[str, float | str]]:
    """One row a truth: every curve of steps with every curve of step times."""
    rng = np.random.default_rng(1)
    sweeps = {name: [swept(f(SWEPT), noise, rng) for _ in range(repeats)] for name, f in STEPS.items()}
    capacities = {name: [timed(f(TIMED), noise, rng) for _ in range(repeats)] for name, f in TIMES.items()}
    rows: list[dict[str, float | str]] = []
    for (name, steps), (shape, times) in itertools.product(STEPS.items(), TIMES.items()):
        found = [advise(c, None, s).best_batch for c, s in zip(capacities[shape], sweeps[name], strict=True)]
        batch = np.array([b for b in found if b is not None], dtype=float)  # a curve may bend too little for a value
        paid = steps(batch) * times(batch) / np.min(steps(EVERY) * times(EVERY))
        apart = np.abs(np.log2(batch)[:, None] - np.log2(batch)[None, :])
        rows.append(
            {
                "steps": name,
                "times": shape,
                "mean": float(np.mean(paid)),
                "p90": float(np.quantile(paid, 0.9)),
                "over_goal": float(np.mean(paid > GOAL)),
                "moved": float(apart.sum() / max(1, len(batch) * (len(batch) - 1))),
                "advised": len(batch) / repeats,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--noise", type=float, default=0.05, help="of steps between seeds; half of it of step times")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = regrets(given.repeats, given.noise)
    print(f"{'steps':14} {'step time':12}  mean    90 %  over 1.05  moved  advised")
    for row in rows:
        print(
            f"{row['steps']:14} {row['times']:12} {row['mean']:6.3f} {row['p90']:6.3f} {row['over_goal']:10.2f}"
            f" {row['moved']:6.2f} {row['advised']:8.2f}"
        )
    figures = {key: np.mean([float(row[key]) for row in rows]) for key in ("mean", "p90", "over_goal", "moved")}
    print("mean " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    if given.output is not None:
        given.output.write_text(json.dumps({"noise": given.noise, "repeats": given.repeats, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
