"""The report of a large sweep: seconds from the store to the finished page, its size, and where the time goes.

    python bench/report.py [--seeds 14] [--profile] [--output FILE]

The store is planted: losses fall exponentially, steps to the target follow a hyperbola in the batch size and a
parabola in the logarithm of the rate, high rates diverge. Writing it is not timed; reading, fits and page are, in a
fresh process as `pybatch report` runs them, and its imports apart.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import os
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pybatch.records import Device, Environment, WorkloadInfo
from pybatch.report.formats.html import write_report
from pybatch.scaling import Scaled
from pybatch.sweep.archive import read_store
from pybatch.sweep.contents import Subject
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.record import record_of, ruled_trials, trial_of
from pybatch.sweep.store import Store
from pybatch.training.trajectory import SMOOTHING, Trajectory, next_evaluation
from pybatch.training.trial import Outcome, Trial

BATCHES = tuple(2**k for k in range(3, 13))
RATES = tuple(2.0**k for k in range(-9, 4))
TARGETS = {"train": 0.1, "test": 0.2}
S_MIN, CRITICAL, RATE = 60.0, 200.0, 0.5  # fewest steps, critical batch, best rate of large batches
BASE = 8
GROUP = {"momentum": 0.9, "weight_decay": 0.0}
PLACE = Environment("3.11.0", "Linux", "0.1.0", None, None, None, None, 1, 0, "pybatch sweep")
GOALS = {"seconds": 5.0, "megabytes": 8.0}


def best_rate(batch: int) -> float:
    """The rate of fewest steps, of the grid."""
    return 2.0 ** round(math.log2(RATE / (1 + CRITICAL / batch)))


def steps_to_target(batch: int, lr: float) -> float:
    """Steps to the train target; infinite where the rate diverges."""
    off = math.log2(lr / best_rate(batch))
    return math.inf if off > 1.5 else S_MIN * (1 + CRITICAL / batch) * (1 + 0.3 * off * off)


def trajectory(needed: float, noise: float, cap: float) -> tuple[str, Trajectory]:
    """Losses from 2.3 to both targets in about so many steps, and how the trial ended."""
    steps = [0]
    last = min(cap, 2 * needed * noise) if math.isfinite(needed) else 40
    while steps[-1] < last:
        steps.append(next_evaluation(steps[-1]))
    at = np.array(steps, dtype=np.int32)
    if not math.isfinite(needed):
        losses = (2.3 * np.exp(0.1 * at)).astype(np.float32)
        return "diverged", Trajectory(at, losses, losses)
    fall = math.log(2.3 / TARGETS["train"]) / (needed * noise)
    train = (2.3 * np.exp(-fall * at)).astype(np.float32)
    ended = "met" if train[-1] <= TARGETS["train"] / 1.3 else "capped"
    return ended, Trajectory(at, train, train + np.float32(0.03))


def plant(
    path: Path,
    batches: tuple[int, ...] = BATCHES,
    rates: tuple[float, ...] = RATES,
    seeds: int = 3,
    rules: tuple[str, ...] = ("tuned", "sqrt", "linear"),
    optimizer: str = "sgd",
) -> int:
    """A store as a finished sweep leaves it; returns the number of its trials."""
    fingerprint = json.dumps({"name": "planted", "model": "mlp", "class": "x"}, sort_keys=True)
    workload = WorkloadInfo("planted", "images", 4810, "fp32", model="mlp")
    subject = Subject(fingerprint, workload, Device("cpu", 0, "Example CPU", None, cores=2), SMOOTHING)
    options = SweepOptions(
        batches=batches,
        rules=rules,
        seeds=seeds,
        target=TARGETS,
        optimizer=optimizer,
        options=GROUP,
        rates=rates,
        base_batch=BASE,
    )

    def put(trials: Iterable[Trial]) -> None:
        for trial in trials:
            needed = steps_to_target(trial.batch, trial.lr)
            cap = 4 * S_MIN * (1 + CRITICAL / trial.batch)
            noise = math.exp(0.05 * np.random.default_rng([trial.batch, trial.seed]).standard_normal())
            end, losses = trajectory(needed, noise, cap)
            store.put(Outcome(trial, end, losses, 0.1))  # type: ignore[arg-type]

    with Store(path, PLACE) as store:
        number = store.begin(subject, options, None)
        for batch in batches:
            some = [
                trial_of(options, fingerprint, "cpu", Scaled(GROUP | {"lr": lr}), batch, seed)
                for lr in rates
                for seed in range(seeds)
            ]
            store.seek(number, batch, some)
            put(some)
            store.end(number, [("tuned", "", batch)])
        found = record_of(store.contents(), number).convergence
        assert found is not None
        for curve in found.curves:  # rules start from the rate that a reader finds best at the base batch
            base = next((p for p in curve.points if p.batch == BASE), None)
            if curve.rule != "tuned" or base is None or base.learning_rate is None:
                continue
            start = base.learning_rate, base.steps
            for rule in rules[1:]:
                for batch in batches:
                    put(ruled_trials(options, fingerprint, "cpu", rule, batch, start, options.seed_range))
                    store.end(number, [(rule, curve.split, batch)])
        return len(store)


_REPORT = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from pybatch.sweep.archive import read_store
from pybatch.report.formats.html import write_report
imported = time.perf_counter()
runs = read_store(Path(sys.argv[1]))
read = time.perf_counter()
write_report(runs, sys.argv[2])
assert "torch" not in sys.modules
print(imported - start, read - imported, time.perf_counter() - read, time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, page = Path(folder, "runs.db"), Path(folder, "report.html")
        trials = plant(store, seeds=given.seeds)
        rows = []
        for _ in range(given.repeats):
            done = subprocess.run(
                [sys.executable, "-c", _REPORT, str(store), str(page)], capture_output=True, text=True, check=True
            )
            rows.append([float(part) for part in done.stdout.split()])
        imports, read, write, processor = np.median(np.array(rows), axis=0).tolist()
        found = {
            "trials": trials,
            "import_s": imports,
            "read_and_fit_s": read,
            "page_s": write,
            "seconds": imports + read + write,
            "processor_s": processor,  # what of it is the report's own, where other processes take turns
            "megabytes": page.stat().st_size / 1e6,
            "load": os.getloadavg()[0],
            "goals": GOALS,
        }
        if given.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: write_report(read_store(store), page))
            pstats.Stats(profile).sort_stats("cumulative").print_stats(25)
    print(json.dumps(found, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
