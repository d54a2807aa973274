"""Do the intervals of `fit_throughput` hold? Planted step times: affine, with a floor, in waves, with a cliff.

    python bench/throughput_coverage.py [--repeats 100] [--resamples 200] [--output FILE]

For each curve, timed at powers of two or at batch sizes between as well: the share of 95 % intervals of the half batch
and of the saturation batch that hold those of the curve itself, by their definitions: from where on throughput is at
least half its ceiling, and from where on doubling the batch gains less than 5 %. In waves and past a cliff these are of
the smooth curve behind: of the ends of waves, and up to the cliff. No device is measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pybatch.fits.throughput import fit_throughput

POWERS = 2.0 ** np.arange(13)  # 1 to 4096
BETWEEN = np.unique(np.concatenate([POWERS, np.round(1.5 * POWERS[1:-1])]))
DRIFT, WITHIN, SAMPLES = 0.01, 0.03, 12  # log step time from one batch size to another, within it, and samples of each
GAIN = 0.05

Times = Callable[[Any], Any]
# Step times, the half batch and the saturation batch.
CURVES: dict[str, tuple[Times, float, float]] = {
    "affine 40": (lambda b: 1e-3 * (1 + b / 40), 40, 380),
    "affine 400": (lambda b: 1e-3 * (1 + b / 400), 400, 3800),
    "floor": (lambda b: 1e-3 * np.maximum(1, 0.2 + b / 80), 40, 152),
    "wave 24": (lambda b: 1e-3 * (1 + 24 * np.ceil(b / 24) / 40), 40, 380),
    "wave 108": (lambda b: 1e-3 * (1 + 108 * np.ceil(b / 108) / 400), 400, 3800),
    "wave 256": (lambda b: 1e-3 * (1 + 256 * np.ceil(b / 256) / 400), 400, 3800),
    "cliff 1.3": (lambda b: 1e-3 * (1 + b / 40) * np.where(b > 600, 1.3, 1.0), 40, 380),
    "cliff slope": (lambda b: 1e-3 * (1 + b / 40 + 0.5 * np.maximum(b - 512, 0) / 40), 40, 380),
}


def timed(curve: Times, batches: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Samples of each batch size."""
    drift = DRIFT * rng.standard_normal(len(batches))
    return [curve(b) * np.exp(d + WITHIN * rng.standard_normal(SAMPLES)) for b, d in zip(batches, drift, strict=True)]


def coverage(name: str, batches: np.ndarray, repeats: int, resamples: int) -> dict[str, Any]:
    curve, half, saturation = CURVES[name]
    rng, held, wide, models, open_ = np.random.default_rng(0), np.zeros(2), [], {}, 0
    for seed in range(repeats):
        fit = fit_throughput(batches, timed(curve, batches, rng), gain=GAIN, seed=seed, resamples=resamples)
        models[fit.model] = models.get(fit.model, 0) + 1
        open_ += fit.half_batch is None
        ends = ((fit.half_low, fit.half_high, half), (fit.saturation_low, fit.saturation_high, saturation))
        held += [low <= truth <= (math.inf if high is None else high) for low, high, truth in ends]
        if fit.half_low and fit.half_high:
            wide.append(fit.half_high / fit.half_low)
    return {
        "curve": name,
        "batches": len(batches),
        "half": held[0] / repeats,
        "saturation": held[1] / repeats,
        "ratio": float(np.median(wide)) if wide else None,
        "open": open_ / repeats,
        "models": models,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'step time':12} sizes    half  saturation  ratio of half's ends")
    for name in CURVES:
        for batches in (POWERS, BETWEEN):
            row = coverage(name, batches, given.repeats, given.resamples)
            rows.append(row)
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else "open"
            shares = f"{100 * row['half']:5.0f} %  {100 * row['saturation']:8.0f} %"
            print(f"{name:12} {row['batches']:5} {shares}  {ratio:>6}  {row['models']}", flush=True)
    if given.output is not None:
        given.output.write_text(json.dumps({"repeats": given.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
