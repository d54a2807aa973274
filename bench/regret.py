"""Does the advice pay? Regret: time to the target at the recommended batch over that at the best batch.

    python bench/regret.py [--workloads digits,scenes,text] [--batch 4-1024*2] [--seeds 3] [--store DIR] [--output FILE]

Truth is an exhaustive sweep with the optimizer that `pybatch bench` trains with, its rate tuned at every batch size,
and step times measured at the same batches: T(B) = S(B) t(B). Against it stand the batches recommended on the noise
scale alone, on branched runs, and on the sweep itself. Between batches measured, ln S and ln t are interpolated in
ln B. Goals: 1.25, 1.10 and 1.05.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pybatch.answer.verdict import advise
from pybatch.base.ranges import parse_batches
from pybatch.capacity.measurement import measure_capacity
from pybatch.jobs.bench import run_bench
from pybatch.jobs.options import BenchOptions
from pybatch.records import Capacity, Convergence, Verdict
from pybatch.sweep.measurement import measure_convergence
from pybatch.workloads.running.finding import find

GOALS = {"noise": 1.25, "branch": 1.10, "sweep": 1.05}
OPTIMIZER = "adamw"  # of `bench`'s own training


def times(capacity: Capacity, steps: Convergence) -> dict[int, float]:
    """Seconds to the train target by batch size, where the target was reached and the step timed."""
    [curve] = [c for c in steps.curves if c.split == "train"]
    reached = {p.batch: p.steps for p in curve.points if p.status == "reached" and p.steps is not None}
    step = {p.batch: p.step_ms / 1e3 for p in capacity.batches if p.step_ms is not None}
    return {n: reached[n] * step[n] for n in sorted(reached.keys() & step.keys())}


def at(batch: float, measured: dict[int, float]) -> float | None:
    """Time at this batch; None beyond those measured, where nothing is known."""
    sizes = np.array(list(measured))
    if not sizes[0] <= batch <= sizes[-1]:
        return None
    return math.exp(np.interp(math.log(batch), np.log(sizes), np.log(list(measured.values()))))


def regret(verdict: Verdict | None, measured: dict[int, float]) -> dict[str, Any]:
    """What following this verdict costs, and why there is no figure where there is none."""
    batch = verdict.best_batch if verdict is not None else None
    found = at(batch, measured) if batch is not None else None
    row: dict[str, Any] = {
        "critical_batch": verdict.critical_batch if verdict is not None else None,
        "best_batch": batch,
        "seconds_to_target": found,
        "regret": found / min(measured.values()) if found is not None else None,
    }
    if batch is None:
        row["reason"] = "no batch was recommended"
    elif found is None:
        row["reason"] = f"batch {batch} is outside those the sweep measured, {min(measured)} to {max(measured)}"
    return row


def measure(name: str, batches: list[int], seeds: int, folder: Path | None, jobs: int) -> dict[str, Any]:
    """Regret of one workload at the three levels of evidence."""
    begin, workload = time.perf_counter(), find(name)
    target = {"train": workload.target["train"]}
    steps = measure_convergence(
        workload,
        batches,
        ["tuned"],
        seeds,
        target=target,
        optimizer=OPTIMIZER,
        device="cpu",
        jobs=jobs,
        store=folder / f"{name}.db" if folder is not None else None,
        resume=folder is not None,
        found=lambda line: print(f"{name} {line}", file=sys.stderr, flush=True),
    )
    swept = time.perf_counter() - begin
    capacity = measure_capacity(workload, device="cpu", batches=batches, time_budget=60, find_max_batch=False)
    measured = times(capacity, steps)
    if len(measured) < 2:
        return {"workload": name, "reason": f"{len(measured)} batch sizes reached the target", "sweep_s": swept}
    plain = run_bench(find(name), BenchOptions(time_budget=70), device="cpu")
    thorough = run_bench(find(name), BenchOptions(time_budget=180, thorough=True), device="cpu")
    verdicts = {
        "noise": plain.verdict,
        "branch": thorough.verdict,
        "sweep": advise(plain.capacity, plain.noise, steps),
    }
    best = min(measured, key=measured.__getitem__)
    return {
        "workload": name,
        "sweep_s": swept,
        "steps": {p.batch: p.steps for c in steps.curves for p in c.points},
        "seconds_to_target": measured,
        "best_measured": best,
        "best_at_edge": best in (min(measured), max(measured)),
        "verdicts": {
            level: regret(verdict, measured) | {"source": verdict.critical_source if verdict is not None else None}
            for level, verdict in verdicts.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="digits,scenes,text")
    parser.add_argument("--batch", default="4-1024*2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--store", type=Path, help="folder of the sweeps, to go on with after a break")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.store is not None:
        given.store.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"load": os.getloadavg()[0], "goals": GOALS, "workloads": []}
    for name in given.workloads.split(","):
        row = measure(name, parse_batches(given.batch), given.seeds, given.store, given.jobs)
        result["workloads"].append(row)
        for level, found in row.get("verdicts", {}).items():
            value = f"{found['regret']:.2f}" if found["regret"] is not None else found["reason"]
            print(f"{name:10} {level:7} batch {found['best_batch']}: regret {value} (goal {GOALS[level]})", flush=True)
        if "reason" in row:
            print(f"{name}: {row['reason']}")
        if given.output is not None:
            given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
