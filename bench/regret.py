"""Does the advice pay? Regret: time to the target at the recommended batch over that at the best batch.

    python bench/regret.py [--workloads digits,scenes,text] [--batch 4-1024*2] [--seeds 3] [--store DIR] [--output FILE]
                           [--busy N] [--disturbed RUNS]

The judge is an exhaustive sweep with the optimizer that `pybatch bench` trains with, its rate tuned at every batch
size, and step times measured at the same batches: T(B) = S(B) t(B). Against it stand the batches recommended on the
noise scale alone, on branched runs, and on a sweep of other seeds: nothing is judged on the runs it was advised from.
Curves are drawn through both as a verdict draws them (`judging.py`), with a 95 % interval; the regret of the measured
times alone stands beside.
Goals: 1.25, 1.10 and 1.05. With --disturbed the advice of the noise scale is asked for so many times more with
--busy processes beside it that never rest; the judge's own times are taken without them. Goal: 1.15 in each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from judging import GOALS, judge, regret

from pybatch.answer.verdict import advise
from pybatch.base.numerals import interval
from pybatch.base.ranges import parse_batches
from pybatch.capacity.measurement import measure_capacity
from pybatch.jobs.bench import run_bench
from pybatch.jobs.options import BenchOptions
from pybatch.records import Convergence
from pybatch.sweep.measurement import measure_convergence
from pybatch.workloads.running.finding import find

OPTIMIZER = "adamw"  # of `bench`'s own training
TIMINGS = 3  # of the judge's steps
JUDGE = 1000  # first seed of the runs that judge; those that advise count from 0


def spin() -> None:
    """Does not rest while the process that started it is there."""
    parent = os.getppid()
    while os.getppid() == parent:
        pass


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many busy processes beside this one."""
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=spin, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()


def measure(
    name: str, batches: list[int], seeds: int, folder: Path | None, jobs: int, busy: int, disturbed: int
) -> dict[str, Any]:
    """Regret of one workload at the three levels of evidence, and of advice on a disturbed machine."""
    begin, workload = time.perf_counter(), find(name)
    target = {"train": workload.target["train"]}

    def sweep(first: int) -> Convergence:
        return measure_convergence(
            workload,
            batches,
            ["tuned"],
            seeds,
            seed=first,
            target=target,
            optimizer=OPTIMIZER,
            device="cpu",
            jobs=jobs,
            store=folder / f"{name}-{first}.db" if folder is not None else None,
            resume=folder is not None,
            found=lambda line: print(f"{name} {line}", file=sys.stderr, flush=True),
        )

    steps, own = sweep(JUDGE), sweep(0)
    swept = time.perf_counter() - begin
    runs = [
        measure_capacity(workload, device="cpu", batches=batches, time_budget=30, find_max_batch=False)
        for _ in range(TIMINGS)
    ]
    by = judge(steps, runs)
    if len(by.measured) < 2:
        return {"workload": name, "reason": f"{len(by.measured)} batch sizes reached the target", "sweep_s": swept}
    plain = run_bench(find(name), BenchOptions(time_budget=70), device="cpu")
    thorough = run_bench(find(name), BenchOptions(time_budget=180, thorough=True), device="cpu")
    verdicts = {
        "noise": plain.verdict,
        "branch": thorough.verdict,
        "sweep": advise(plain.capacity, plain.noise, own),
    }
    beside = []
    for place in range(disturbed):
        with neighbours(busy):
            run = run_bench(find(name), BenchOptions(time_budget=70, seed=place), device="cpu")
        said = run.verdict.confidence if run.verdict is not None else None
        beside.append(
            regret(run.verdict, by)
            | {"confidence": said.level if said else None, "reasons": list(said.reasons) if said else []}
        )
    best = by.fastest
    return {
        "workload": name,
        "sweep_s": swept,
        "steps": {p.batch: p.steps for c in steps.curves for p in c.points},
        "seconds_to_target": by.measured,
        "best_measured": best,
        "best_at_edge": best in (min(by.measured), max(by.measured)),
        "verdicts": {
            level: regret(verdict, by) | {"source": verdict.critical_source if verdict else None}
            for level, verdict in verdicts.items()
        },
        "disturbed": beside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="digits,scenes,text")
    parser.add_argument("--batch", default="4-1024*2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--store", type=Path, help="folder of the sweeps, to go on with after a break")
    parser.add_argument("--busy", type=int, default=2, help="processes beside a disturbed run")
    parser.add_argument("--disturbed", type=int, default=0, help="runs of `bench` beside busy processes")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.store is not None:
        given.store.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"load": os.getloadavg()[0], "goals": GOALS, "workloads": []}
    for name in given.workloads.split(","):
        row = measure(
            name, parse_batches(given.batch), given.seeds, given.store, given.jobs, given.busy, given.disturbed
        )
        result["workloads"].append(row)
        if given.output is not None:
            given.output.write_text(json.dumps(result, indent=2) + "\n")
        beside = [("disturbed", found) for found in row.get("disturbed", [])]
        for level, found in [*row.get("verdicts", {}).items(), *beside]:
            value = f"{found['regret']:.2f}" if found["regret"] is not None else found["reason"]
            ends = interval(found.get("regret_low"), found.get("regret_high"), "{:.2f}".format)
            said = f"{value} {ends}".strip()
            print(f"{name:10} {level:9} batch {found['best_batch']}: regret {said} (goal {GOALS[level]})", flush=True)
        if "reason" in row:
            print(f"{name}: {row['reason']}")


if __name__ == "__main__":
    main()
