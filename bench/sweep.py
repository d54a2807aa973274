"""Sweeps: trials per second of replicas against the plain loop, what store and workers cost, the tuned digits sweep.

    python bench/sweep.py [--parts replicas,store,workers,digits,domains] [--models mlp,cnn] [--batches 8,16,32,64]
                          [--quick] [--threads N] [--jobs N] [--ray] [--output FILE]

The part "domains" is tuned sweeps of both models of `text` and `scenes` to their targets: batch 8, 32 and 128 (4, 16
and 64 of `scenes`, where its steps fall most) with one seed (goal: 100 s on two cores) and, but with --quick, seven
batch sizes with three (6 minutes).

The loop is pybatch's own, one optimizer step a replica, with the same batches; both sides do the same evaluations, and
their losses are compared before they are timed. Samples of the two are interleaved. Both run on --threads threads: a
worker of `--jobs` as many as there are cores has one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pybatch.device.environment import capture
from pybatch.device.memory import keep_freed
from pybatch.scaling import Scaled
from pybatch.sweep.checks import settled
from pybatch.sweep.measurement import measure_convergence
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.record import trial_of
from pybatch.sweep.store import Store
from pybatch.training.loop import Loop
from pybatch.training.replicas import Replicas
from pybatch.training.stack import Stack
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import Outcome, Trial
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")
SEEDS = 3
INTERVAL = 8  # steps between two evaluations, as past step 128 of a trial


def trials(model: str, batch: int) -> list[Trial]:
    """36 trials: 12 rates, of which none diverges, and 3 seeds."""
    options = settled(SweepOptions(batches=[batch], seeds=SEEDS), find("digits", model=model))
    rates = [0.3 * 2 ** (-k / 2) for k in range(12)]
    return [
        trial_of(options, "bench", "cpu", Scaled({**options.options, "lr": lr}), batch, seed)
        for lr in rates
        for seed in options.seed_range
    ]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def replicas(model: str, batch: int, repeats: int) -> dict[str, Any]:
    """Trial-steps per second of both forms, one evaluation every INTERVAL steps."""
    workload, some = find("digits", model=model), trials(model, batch)
    sides: dict[str, Replicas] = {"loop": Loop(workload, some, CPU), "stacked": Stack(workload, some, CPU)}
    losses = {}
    for name, side in sides.items():
        side.advance(3)
        losses[name] = side.evaluate()
    np.testing.assert_allclose(losses["stacked"], losses["loop"], rtol=1e-3)

    def work(side: Replicas) -> None:
        side.advance(INTERVAL)
        side.evaluate()

    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            samples[name].append(timed(lambda side=side: work(side)))
    rate = {name: len(some) * INTERVAL / statistics.median(values) for name, values in samples.items()}
    ratios = [a / b for a, b in zip(samples["loop"], samples["stacked"], strict=True)]
    return {
        "model": model,
        "batch": batch,
        "trials": len(some),
        "loop_trial_steps_per_s": rate["loop"],
        "stacked_trial_steps_per_s": rate["stacked"],
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def store(count: int) -> dict[str, float]:
    """Milliseconds to claim and put one trial of 120 evaluations, and to read one back."""
    steps = np.arange(120, dtype=np.int32)
    losses = np.random.default_rng(0).random(120, dtype=np.float32)
    some = [Trial("bench", "sgd", Scaled({"lr": 0.1}), 8, seed, "fp32", "cpu") for seed in range(count)]
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db", capture(seed=0)) as kept:
        claim = timed(lambda: kept.claim(t.key for t in some))
        put = timed(lambda: [kept.put(Outcome(t, "met", Trajectory(steps, losses, losses), 0.0)) for t in some])
        read = timed(lambda: kept.outcomes(some))
    return {"claim_ms": 1e3 * claim / count, "put_ms": 1e3 * put / count, "read_ms": 1e3 * read / count}


def workers(ray: bool) -> list[dict[str, Any]]:
    """A sweep of four short batches in this process, in two processes and, where asked for, on Ray; starts included."""
    kinds: dict[str, dict[str, Any]] = {"inline": {}, "jobs 2": {"jobs": 2}}
    if ray:
        kinds["ray auto"] = {"ray": "auto"}
    rows = []
    for name, arguments in kinds.items():
        begin = time.perf_counter()
        found = measure_convergence(
            find("digits"), [16, 32, 64, 128], ["tuned"], SEEDS, target={"train": 0.5}, device="cpu", **arguments
        )
        seconds = time.perf_counter() - begin
        trained = found.trials or 1
        rows.append({"workers": name, "seconds": seconds, "trials": trained, "ms_per_trial": 1e3 * seconds / trained})
        print(f"{name}: {seconds:.1f} s, {trained} trials, {1e3 * seconds / trained:.0f} ms each", flush=True)
    return rows


def digits(batches: list[int], jobs: int, search: str) -> dict[str, Any]:
    """The tuned digits sweep to a train loss of 0.1, from nothing: starting the workers is included."""
    begin = time.perf_counter()
    found = measure_convergence(
        find("digits"),
        batches,
        ["tuned"],
        SEEDS,
        target={"train": 0.1},
        device="cpu",
        jobs=jobs,
        search=search,
        found=lambda row: print(f"  {time.perf_counter() - begin:6.1f} s {row}", flush=True),
    )
    [curve] = found.curves
    return {
        "search": search,
        "jobs": jobs,
        "seconds": time.perf_counter() - begin,
        "trials": found.trials,
        "steps": {p.batch: p.steps for p in curve.points},
        "critical_batch": curve.critical_batch,
        "low": curve.low,
        "high": curve.high,
    }


# Workload, model, the least batch size.
DOMAINS = (("text", "lstm", 8), ("text", "transformer", 8), ("scenes", "unet", 4), ("scenes", "dilated", 4))


def domains(whole: bool, jobs: int) -> list[dict[str, Any]]:
    """Seconds of the tuned sweeps, starts included, with what they found; CPU seconds are of the workers too."""
    rows = []
    for name, model, least in DOMAINS:
        few, many = [least * 4**k for k in range(3)], [least * 2**k for k in range(7)]
        for batches, seeds in ((few, 1), *([(many, SEEDS)] if whole else [])):
            begin, cpu = time.perf_counter(), sum(os.times()[:4])
            found = measure_convergence(find(name, model=model), batches, ["tuned"], seeds, device="cpu", jobs=jobs)
            [curve] = [c for c in found.curves if c.split == "train"]
            row = {
                "workload": name,
                "model": model,
                "seeds": seeds,
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": sum(os.times()[:4]) - cpu,
                "trials": found.trials,
                "steps": {p.batch: p.steps for p in curve.points},
                "rates": {p.batch: p.learning_rate for p in curve.points},
                "critical_batch": curve.critical_batch,
                "low": curve.low,
                "high": curve.high,
            }
            rows.append(row)
            print(
                f"{name} {model}, {len(batches)} batch sizes, {seeds} seeds: {row['seconds']:.1f} s, "
                f"{row['cpu_seconds']:.0f} CPU s, {found.trials} trials, steps {row['steps']}, rates {row['rates']}, "
                f"critical batch {curve.critical_batch} [{curve.low}, {curve.high}]",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="replicas,store,workers,digits")
    parser.add_argument("--models", default="mlp,cnn")
    parser.add_argument("--batches", default="8,16,32,64,256")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="of the digits sweep")
    parser.add_argument("--searches", default="race,grid", help="of the digits sweep")
    parser.add_argument("--quick", action="store_true", help="few repeats, a sweep of three batch sizes")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    load, parts = os.getloadavg()[0], given.parts.split(",")
    all_threads = torch.get_num_threads()
    print(f"{given.threads} of {all_threads} threads, load {load:.1f} at the start")
    result: dict[str, Any] = {"load": load, "threads": given.threads, "replicas": []}
    torch.set_num_threads(given.threads)
    keep_freed()  # as in every process of a sweep
    for model in given.models.split(",") if "replicas" in parts else ():
        for batch in map(int, given.batches.split(",")):
            row = replicas(model, batch, 3 if given.quick else given.repeats)
            result["replicas"].append(row)
            print(
                f"{model} batch {batch}: loop {row['loop_trial_steps_per_s']:.0f}, "
                f"stacked {row['stacked_trial_steps_per_s']:.0f} trial-steps/s, "
                f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
                flush=True,
            )
    torch.set_num_threads(all_threads)
    if "store" in parts:
        result["store"] = store(200)
        print("store:", ", ".join(f"{key} {value:.2f}" for key, value in result["store"].items()), flush=True)
    if "workers" in parts:
        result["workers"] = workers(given.ray)
    if "domains" in parts:
        result["domains"] = domains(not given.quick, given.jobs)
    result["digits"] = []
    for search in given.searches.split(",") if "digits" in parts else ():
        row = digits([16, 64, 256] if given.quick else [8 * 2**k for k in range(11)], given.jobs, search)
        result["digits"].append(row)
        critical = row["critical_batch"] if row["critical_batch"] is not None else math.nan
        print(
            f"tuned digits sweep, {search}, {given.jobs} jobs: {row['seconds']:.1f} s, {row['trials']} trials, "
            f"critical batch {critical:.1f}"
        )
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
