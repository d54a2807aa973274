"""The verdict on planted truths: how often its interval holds the best batch, and what following it costs.

    python bench/planted_verdict.py [--draws 2000] [--levels noise,branch,sweep] [--seed 1] [--output FILE]

A truth is a curve of steps S(B) and a curve of step times t(B), of families drawn with random parameters; the best
batch is the argmin of S(B) t(B) over every whole batch size that fits. What pybatch would see of it is drawn: a sweep
of three seeds, branches, or a noise scale; step times with drift and samples, and the closer looks of `pybatch bench`
(a sweep's with `--sweep`). `advise` answers, and

    coverage   its interval of the best batch holds the true one
    regret     true time at the batch it advises over the least there is
    knowing    the regret of one who is told S's families, t(B) itself and what a reading of the critical batch stands
               for, and advises the batch of least expected regret: nobody can have less by this evidence. By a noise
               scale or branches; a sweep says more than one reading

Known to the draws alone, and stated by level: a noise scale, and branches from tuned rates, are the critical batch (the
bend of S) within a factor of 4 both ways in 95 % of cases. No device is measured: load does not matter.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pybatch.answer.best import LOOKS, closer
from pybatch.answer.verdict import advise
from pybatch.fits.steps import fit_steps
from pybatch.fits.throughput import fit_throughput
from pybatch.records import (
    BatchPoint,
    Branching,
    Capacity,
    Convergence,
    ConvergencePoint,
    Curve,
    NoiseScale,
    RateSteps,
    StepsFit,
    Verdict,
)

LEVELS = ("noise", "branch", "sweep")
GOALS = {"noise": (1.06, 1.20), "branch": (1.06, 1.20), "sweep": (1.03, 1.10)}  # mean and 95 % of regret
FACTOR = {"noise": 4.0, "branch": 4.0}  # 95 % of the evidence's own error, as a factor
SEEDS = 3
BENDS = (20, 800)  # of S, between which they are drawn, uniform in the log
MOST = 16_384  # examples: the data set, where memory allows more

Array = np.ndarray
Curves = Callable[[Array], Array]


@dataclass(frozen=True)
class Truth:
    steps: str
    times: str
    s: Curves
    t: Curves
    most: int
    noise: float  # of log steps, between seeds
    drift: float  # of log step time, from batch size to batch size
    critical: float  # the bend of S, B_c

    @property
    def time(self) -> Array:
        """Time to the target at 1, 2, ..., most."""
        batch = np.arange(1, self.most + 1, dtype=float)
        return self.s(batch) * self.t(batch)


def _steps(bend: float, rng: np.random.Generator) -> dict[str, Curves]:
    floor = rng.uniform(30, 300)
    low, high, sharp = rng.uniform(0.7, 0.9), rng.uniform(1.1, 1.5), rng.uniform(1.6, 4.0)
    turn = bend * rng.uniform(15, 60)
    return {
        "hyperbola": lambda b: floor * (1 + bend / b),
        "power below 1": lambda b: floor * (1 + (bend / b) ** low),
        "power above 1": lambda b: floor * (1 + (bend / b) ** high),
        "knee": lambda b: floor * (1 + (bend / b) ** sharp) ** (1 / sharp),
        "u-turn": lambda b: floor * (1 + bend / b + b / turn),
    }


def _times(rng: np.random.Generator) -> dict[str, Curves]:
    half, base = math.exp(rng.uniform(math.log(10), math.log(600))), 10 ** rng.uniform(-4, -2)
    flat, wave = rng.uniform(0.1, 0.6), min(int(rng.integers(12, 97)), int(2 * half))
    cliff, worse, power = half * rng.uniform(0.3, 4), rng.uniform(1.2, 2.0), rng.uniform(0.7, 0.95)
    return {
        "affine": lambda b: base * (1 + b / half),
        "floor": lambda b: base * np.maximum(1, flat + b / half),
        "waves": lambda b: base * (half / wave + np.ceil(b / wave)),
        "cliff": lambda b: base * (1 + b / half * np.where(b > cliff, worse, 1.0)),
        "memory": lambda b: base * (1 + b / half),
        "sublinear": lambda b: base * (1 + (b / half) ** power),
    }


def truths(rng: np.random.Generator) -> Iterator[Truth]:
    """One of each pair of families, with parameters of its own."""
    for steps in _steps(1.0, rng):
        for times in _times(rng):
            bend = math.exp(rng.uniform(*np.log(BENDS)))
            most = int(math.exp(rng.uniform(math.log(24), math.log(600)))) if times == "memory" else MOST
            noise, drift = rng.uniform(0.03, 0.12), rng.uniform(0.003, 0.03)
            yield Truth(steps, times, _steps(bend, rng)[steps], _times(rng)[times], most, noise, drift, bend)


def kinked(rng: np.random.Generator) -> Iterator[Truth]:
    """The knees among them, with the sharpest bend there is: perfect scaling to the batch B_c, and none from it on."""
    for truth in truths(rng):
        if truth.steps == "knee":
            yield replace(truth, steps="kink", s=partial(_kink, truth.critical))


def _kink(critical: float, batch: Array) -> Array:
    found: Array = 100 * np.maximum(1.0, critical / batch)
    return found


def timed(truth: Truth, rng: np.random.Generator) -> Capacity:
    """What a capacity measurement may record: powers of two, to 4,096 or to what fits."""
    size = 2 ** np.arange(0, 13)
    size = size[size <= truth.most]
    if truth.most < MOST and size[-1] < truth.most:
        size = np.append(size, truth.most)
    samples, points = sampled(truth, size, rng)
    fit = fit_throughput(size, samples, resamples=200)
    return Capacity(
        t0_ms=1e3 * fit.t0_s,
        ceiling_samples_per_s=fit.ceiling,
        half_batch=fit.half_batch,
        saturation_batch=fit.saturation_batch,
        saturation_low=fit.saturation_low,
        saturation_high=fit.saturation_high,
        saturation_measured=None,
        max_batch=truth.most if truth.most < MOST else 10 * MOST,
        max_batch_verified=True,
        model=fit,
        batches=points,
    )


def sampled(truth: Truth, size: Array, rng: np.random.Generator) -> tuple[Array, tuple[BatchPoint, ...]]:
    """Step times at these batch sizes as they are timed, each with a drift of its own; and as points of a record."""
    timed = truth.t(size.astype(float)) * np.exp(truth.drift * rng.standard_normal(len(size)))
    samples = timed[:, None] * np.exp(0.01 * rng.standard_normal((len(size), 10)))
    error = 1.96 * 1.25 * 0.01 / math.sqrt(10)
    return samples, tuple(
        BatchPoint(int(b), "ok", 1e3 * t, 1e3 * t * (1 - error), 1e3 * t * (1 + error), float(b / t), samples=10)
        for b, t in zip(size, np.median(samples, axis=1), strict=True)
    )


def swept(truth: Truth, rng: np.random.Generator) -> Convergence:
    """What a sweep of SEEDS seeds may record, at powers of two from 4 to 1,024."""
    size = 2 ** np.arange(2, 11)
    steps = truth.s(size.astype(float))[:, None] * np.exp(truth.noise * rng.standard_normal((len(size), SEEDS)))
    table = np.maximum(1, np.round(steps))
    found = fit_steps(size, table, cap=1e7, resamples=200)
    points = tuple(
        ConvergencePoint(
            int(b),
            float(np.median(row)),
            "reached",
            SEEDS,
            0.1,
            reached=SEEDS,
            rates=(RateSteps(0.1, tuple(map(float, row)), ("reached",) * SEEDS),),
        )
        for b, row in zip(size, table, strict=True)
    )
    curve = Curve("tuned", "train", points, found.s_min, found.critical_batch, found.low, found.high, 0.1, fit=found)
    return Convergence((curve,), seeds=SEEDS)


def scaled(truth: Truth, factor: float, error: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A reading of the critical batch, off by the evidence's own factor and by its stated error; with its interval."""
    value = truth.critical * math.exp(rng.standard_normal() * math.log(factor) / 1.96 + error * rng.standard_normal())
    return value, value * math.exp(-1.96 * error), value * math.exp(1.96 * error)


def noisy(truth: Truth, rng: np.random.Generator) -> NoiseScale:
    value, low, high = scaled(truth, FACTOR["noise"], rng.uniform(0.03, 0.25), rng)
    return NoiseScale(value, low, high, 1.0, value, "resolved", "per-example", 50)


def branched(truth: Truth, rng: np.random.Generator) -> Convergence:
    value, low, high = scaled(truth, FACTOR["branch"], rng.uniform(0.1, 0.3), rng)
    fit = StepsFit(
        "hyperbola", 1.0, value, low, high, 0.2 * value, value, 4 * value, parameters={"s_min": 1.0, "b_c": value}
    )
    branching = Branching(100, 0.5, 32, 1000, 0.4, 0.01, (), None, None, None, fit, tuned=True)
    return Convergence((), branches=(branching,))


def seen(truth: Truth, level: str, rng: np.random.Generator) -> tuple[Capacity, NoiseScale | None, Convergence | None]:
    """The records that a run of this level leaves; higher levels have the lower ones too."""
    noise = noisy(truth, rng)
    steps = {"noise": lambda: None, "branch": lambda: branched(truth, rng), "sweep": lambda: swept(truth, rng)}
    return timed(truth, rng), noise, steps[level]()


def judged(
    truth: Truth, records: tuple[Capacity, NoiseScale | None, Convergence | None], rng: np.random.Generator
) -> dict[str, float | bool]:
    """What the advice on these records is worth, after the closer looks that `pybatch bench` takes."""
    capacity, noise, steps = records
    time = truth.time

    def lost(batch: int | None) -> float:
        return float(time[min(batch, truth.most) - 1] / time.min()) if batch is not None else math.nan

    best = int(np.argmin(time)) + 1

    def holds(verdict: Verdict) -> bool:
        high = verdict.best_high if verdict.best_high is not None else math.inf
        return (verdict.best_low or 1) <= best <= high

    first = advise(capacity, noise, steps)
    for _ in range(LOOKS):
        advised = advise(capacity, noise, steps).best_batch
        sizes = np.array(closer(capacity, advised)) if advised is not None else np.array([])
        sizes = sizes[sizes <= truth.most]
        if not len(sizes):
            break
        points = (*capacity.batches, *sampled(truth, sizes, rng)[1])
        capacity = replace(capacity, batches=tuple(sorted(points, key=lambda point: point.batch)))
    verdict = advise(capacity, noise, steps)
    low, high = verdict.best_low or 1, verdict.best_high if verdict.best_high is not None else math.inf
    return {
        "holds": holds(verdict),
        "held": holds(first),
        "width": math.log2(high / low) if math.isfinite(high) else math.nan,
        "regret": lost(verdict.best_batch),
        "without": lost(first.best_batch),
    }


def knowing(
    truth: Truth,
    noise: NoiseScale,
    steps: Convergence | None,
    rng: np.random.Generator,
    among: tuple[float, float] = BENDS,
) -> float:
    """The regret of one who knows all but which S it is, its bend among these, and has these readings of the bend."""
    found = [(noise.b_simple, noise.low, noise.high, FACTOR["noise"])]
    if steps is not None:
        fit = steps.branches[0].fit
        assert fit is not None
        found.append((fit.critical_batch, fit.low, fit.high, FACTOR["branch"]))
    bends = np.exp(np.linspace(*np.log(among), 60))
    likelihood = np.ones(len(bends))
    for value, low, high, factor in found:
        assert value is not None
        assert low is not None
        assert high is not None
        spread = math.hypot(math.log(factor), math.log(high / low) / 2) / 1.96
        likelihood *= np.exp(-0.5 * (np.log(bends / value) / spread) ** 2)
    sizes = np.unique(np.round(np.geomspace(1, truth.most, 600))).astype(int)
    expected = np.zeros(len(sizes))
    for bend, weight in zip(bends, likelihood, strict=True):
        for curve in _steps(bend, rng).values():
            time = curve(sizes.astype(float)) * truth.t(sizes.astype(float))
            expected += weight * time / time.min()
    return float(truth.time[sizes[np.argmin(expected)] - 1] / truth.time.min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="truths at each level")
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kink", action="store_true", help="steps that fall as 1 / B to a kink, and no others")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {}
    for level in given.levels.split(","):
        rng, looks, others = (np.random.default_rng(seed) for seed in (given.seed, [given.seed, 1], [given.seed, 2]))
        drawn: list[tuple[Truth, dict[str, float | bool]]] = []
        while len(drawn) < given.draws:
            for truth in kinked(rng) if given.kink else truths(rng):
                records = seen(truth, level, rng)
                row = judged(truth, records, looks)
                if level != "sweep" and records[1] is not None:
                    row["knowing"] = knowing(truth, records[1], records[2], others)
                    row["unprimed"] = knowing(truth, records[1], records[2], others, (1, MOST))
                drawn.append((truth, row))
        result[level] = report(level, drawn)
        if given.output is not None:  # as each level ends
            given.output.write_text(json.dumps(result, indent=2) + "\n")


def report(level: str, drawn: list[tuple[Truth, dict[str, float | bool]]]) -> dict[str, dict[str, float | None]]:
    """Prints a row a family, and all of them together."""
    asked = "   no looks    95 %    knowing    95 %   unprimed    95 %  advised"
    print(f"\n{level}: {len(drawn)} truths{'':12} coverage  width  regret mean    95 %{asked}")
    families = sorted({truth.steps for truth, _ in drawn}) + sorted({truth.times for truth, _ in drawn})
    rows: dict[str, dict[str, float | None]] = {}
    for family in [*families, "all"]:
        own = [row for truth, row in drawn if family in (truth.steps, truth.times) or family == "all"]
        regret = np.array([row["regret"] for row in own], dtype=float)
        known = regret[np.isfinite(regret)]
        without = np.array([row["without"] for row in own], dtype=float)
        without = without[np.isfinite(without)]
        best, unprimed = (
            np.array([row.get(name, math.nan) for row in own], dtype=float) for name in ("knowing", "unprimed")
        )
        rows[family] = {
            "truths": len(own),
            "coverage": float(np.mean([row["holds"] for row in own])),
            "without_looks_coverage": float(np.mean([row["held"] for row in own])),
            "width_doublings": float(np.nanmedian([row["width"] for row in own])),
            "regret_mean": float(known.mean()),
            "regret_p95": float(np.quantile(known, 0.95)),
            "without_looks_mean": float(without.mean()),
            "without_looks_p95": float(np.quantile(without, 0.95)),
            "knowing_mean": None if np.isnan(best).any() else float(best.mean()),
            "knowing_p95": None if np.isnan(best).any() else float(np.quantile(best, 0.95)),
            "unprimed_mean": None if np.isnan(unprimed).any() else float(unprimed.mean()),
            "unprimed_p95": None if np.isnan(unprimed).any() else float(np.quantile(unprimed, 0.95)),
            "advised": len(known) / len(own),
        }
        found = rows[family]
        held, width = 100 * found["coverage"], found["width_doublings"]
        print(
            f"  {family:30} {held:6.1f} % {width:6.2f} {found['regret_mean']:12.3f} {found['regret_p95']:7.3f}"
            f" {found['without_looks_mean']:10.3f} {found['without_looks_p95']:7.3f}"
            f" {best.mean():10.3f} {np.quantile(best, 0.95):7.3f}"
            f" {unprimed.mean():10.3f} {np.quantile(unprimed, 0.95):7.3f} {found['advised']:8.2f}"
        )
    mean, p95 = GOALS[level]
    print(f"  goals: coverage 93 to 97 %, no family under 88 %; regret {mean} and {p95}")
    return rows


if __name__ == "__main__":
    main()
