"""Does a batch-size schedule pay? Trainings to a target by a schedule against the best fixed batch, seed by seed.

    python bench/schedule.py [--problems digits-mlp ...] [--seeds N] [--store FILE] [--output FILE]

Each problem: a sweep with the rate tuned at every batch size (seeds from 0) and step times of one thread give the best
fixed batch, that of the least steps times step time. Trainings at it read the noise scale along them (the same seeds),
and `answer/schedule.py` makes a schedule of that, at the examples that the fixed batch takes by its model. Out of
sample, on other seeds (from 1000), these are trained to the same target, with rates by the square root of the batch:

    fixed      the best fixed batch at its tuned rate
    schedule   the stages
    ramp       the same batch from an eighth of it on, linearly over the first half of the examples
    warm-up    the same batch, its rate rising linearly over a tenth of the steps

Seconds are modelled: step times measured once, in processor time of the one thread, which neighbours leave alone, and
summed over the steps. What is measured goes to the store at once, and a second run goes on from there.
Goal: 0.80 of the fixed batch's steps at 1.05 of its examples, on two of four problems.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from pybatch.answer.course import course_of
from pybatch.answer.schedule import plan_schedule
from pybatch.base.codec import decode, encode
from pybatch.device.identity import describe
from pybatch.noise import Trajectory, attach
from pybatch.records import NoisePoint, NoiseTrajectory, Run, Schedule
from pybatch.schedule import BatchSchedule
from pybatch.sweep.measurement import measure_convergence
from pybatch.training.trajectory import crossing_at, next_evaluation
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session, fixed_batches

GOAL = {"steps": 0.80, "examples": 1.05}
OPTIMIZER, RULE = "adamw", "sqrt"
DERIVE, JUDGE = 0, 1000  # first seeds of what a schedule is derived from, and of what it is judged on
DERIVING = 3
LONGEST = 4.0  # times the examples of the fixed batch, after which a run is given up
RAMP, RAMPED = 8, 0.5  # steps of a ramped batch, and the share of the examples that they are spread over
WARM = 0.1  # share of the steps in which a rate is warmed up
ARMS = ("fixed", "schedule", "ramp", "warm-up")
FIGURES = ("steps", "examples", "seconds")
TIMINGS = 6  # rounds of step times, of two steps each
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """What is trained, to which train loss, and at which batch sizes the best fixed one is sought."""

    workload: str
    model: str
    target: float
    batches: tuple[int, ...]
    rates: tuple[float, ...] | None = None  # first ones of the search; None: the sweep's own
    options: tuple[str, ...] = ()


SHORT = ("length=32",)  # of the texts
PROBLEMS = {
    "digits-mlp": Problem("digits", "mlp", 0.03, (16, 32, 64, 128, 256, 512, 1024)),
    "digits-cnn": Problem("digits", "cnn", 0.03, (16, 32, 64, 128, 256)),
    "text-lstm": Problem("text", "lstm", 2.3, (8, 32, 128), (2e-3, 4e-3, 8e-3), SHORT),
    "text-transformer": Problem("text", "transformer", 2.3, (8, 32, 128), (2e-3, 4e-3, 8e-3), SHORT),
}


@dataclass
class Course:
    """A training on its way to a target: losses at its evaluations, and how many steps it made of each batch size."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    made: list[tuple[int, int]] = field(default_factory=list)  # (batch, steps), in their order

    def stepped(self, batch: int) -> None:
        """A step was made."""
        if self.made and self.made[-1][0] == batch:
            self.made[-1] = (batch, self.made[-1][1] + 1)
        else:
            self.made.append((batch, 1))

    def evaluated(self, step: int, loss: float, target: float) -> int | None:
        """The step at which the smoothed loss met the target, once it has."""
        self.steps.append(step)
        self.losses.append(loss)
        found = crossing_at(np.array(self.steps), np.array(self.losses), len(self.steps) - 1, target)
        return int(found.steps) if found is not None else None


def cut(made: Sequence[tuple[int, int]], steps: int) -> list[tuple[int, int]]:
    """The first so many of the steps that were made."""
    found = []
    for batch, count in made:
        if (taken := min(count, steps)) > 0:
            found.append((batch, taken))
            steps -= taken
    return found


def spent(made: Sequence[tuple[int, int]], step_s: Callable[[int], float]) -> dict[str, float]:
    """Steps, examples and modelled seconds of (batch, steps) in turn."""
    return {
        "steps": sum(count for _, count in made),
        "examples": sum(batch * count for batch, count in made),
        "seconds": sum(step_s(batch) * count for batch, count in made),
    }


def clock_of(measured: Mapping[int, float]) -> Callable[[int], float]:
    """Seconds of a step at any batch size: ln t over ln B between those measured, flat below, in proportion above."""
    sizes = np.array(sorted(measured), dtype=float)
    logs = np.log([measured[int(size)] for size in sizes])

    def at(batch: int) -> float:
        beyond = max(1.0, batch / sizes[-1])
        return float(np.exp(np.interp(math.log(batch), np.log(sizes), logs)) * beyond)

    return at


def ratio(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> dict[str, Any]:
    """Geometric mean of ours over theirs, paired by seed, with its 95 % interval over the seeds drawn anew.

    Args:
        ours, theirs: by seed; None: the target was not reached, after which there is no ratio but a reason.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    missed = [sum(side[seed] is None for seed in seeds) for side in (ours, theirs)]
    if len(seeds) < 2 or any(missed):
        why = f"{missed[0]} and {missed[1]} of {len(seeds)} did not reach the target"
        return {"ratio": None, "low": None, "high": None, "seeds": len(seeds), "reason": why}
    logs = np.array([math.log(float(ours[seed] or 0) / float(theirs[seed] or 0)) for seed in seeds])
    drawn = bootstrap((logs,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0))
    low, high = drawn.confidence_interval
    ends = {"low": math.exp(low), "high": math.exp(high)}
    return {"ratio": math.exp(float(logs.mean())), **ends, "seeds": len(seeds)}


def against_fixed(runs: Mapping[str, Mapping[str, Any]], step_s: Callable[[int], float]) -> dict[str, Any]:
    """For every arm but the fixed batch the ratio of each figure to it; and whether the schedule meets the goal."""
    table: dict[str, dict[int, dict[str, float] | None]] = {
        arm: {int(s): spent(run["made"], step_s) if run["reached"] else None for s, run in by_seed.items()}
        for arm, by_seed in runs.items()
    }

    def column(arm: str, name: str) -> dict[int, float | None]:
        return {seed: found[name] if found is not None else None for seed, found in table[arm].items()}

    rows: dict[str, Any] = {
        arm: {name: ratio(column(arm, name), column("fixed", name)) for name in FIGURES}
        for arm in table
        if arm != "fixed"
    }
    medians: dict[str, Any] = {}
    for arm, by_seed in table.items():
        whole = [found for found in by_seed.values() if found is not None]
        medians[arm] = {name: statistics.median(found[name] for found in whole) if whole else None for name in FIGURES}
    own = [(rows["schedule"][name]["ratio"], most) for name, most in GOAL.items()] if "schedule" in rows else []
    return {
        "against_fixed": rows,
        "medians": medians,
        "meets_goal": bool(own) and all(found is not None and found <= most for found, most in own),
    }


class Store:
    """What was measured, by problem, in one JSON file that is written anew after every piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def piece(self, problem: str, name: str, measure: Callable[[], Any]) -> Any:
        """A piece as it is stored; measured where it is not."""
        own = self.found.setdefault(problem, {})
        if name not in own:
            begin = time.process_time()
            made = measure()
            own[name] = json.loads(json.dumps(made))
            own.setdefault("processor_s", {})[name] = round(time.process_time() - begin, 2)
            whole = self.path.with_suffix(".writing")
            whole.write_text(json.dumps(self.found) + "\n")
            whole.replace(self.path)
        return own[name]


def step_times(workload: Workload, batches: Sequence[int]) -> dict[int, float]:
    """Median processor milliseconds of a step at each batch size, in rounds over all of them."""
    session = Session(workload, CPU)
    optimizer = session.optimizer_of(OPTIMIZER, {"lr": 1e-9})
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(TIMINGS):
        for batch in batches:
            drawn = session.batch(batch)
            for warm in (True, False, False):
                begin = time.process_time()
                optimizer.zero_grad()
                session.backward(drawn)
                optimizer.step()
                if not warm:
                    seconds[batch].append(time.process_time() - begin)
    return {batch: 1e3 * statistics.median(own) for batch, own in seconds.items()}


def train(
    workload: Workload,
    seed: int,
    rate: float,
    base: int,
    stages: Schedule | Sequence[tuple[int, int]],
    target: float,
    most: float,
    *,
    warm: int = 0,
    noise: bool = False,
) -> dict[str, Any]:
    """One training to the target, or to so many examples: the steps made of each batch size.

    Args:
        rate: at the base batch; it follows the batch by RULE.
        warm: steps in which the rate rises linearly from nothing.
        noise: read the noise scale along it, from exact per-example gradients of every step.
    """
    session = Session(workload, CPU, seed=seed)
    optimizer = session.optimizer_of(OPTIMIZER, {"lr": rate})
    warming = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm - 1) if warm > 1 else None
    batches = [s.batch for s in stages.stages] if isinstance(stages, Schedule) else [batch for _, batch in stages]
    schedule = BatchSchedule(stages, optimizer, base_batch=base, micro_batch=math.gcd(*batches), rate=RULE)
    handle = attach(session.model, optimizer, "per-example", every=1) if noise else None
    along = Trajectory(handle, every=1) if handle is not None else None
    held, _ = fixed_batches(workload, CPU)
    course, due, reached = Course(), 0, None
    while reached is None and schedule.examples < most:
        if schedule.steps == due:
            if (reached := course.evaluated(due, float(session.evaluate(held)), target)) is not None:
                break
            due = next_evaluation(due)
        batch = schedule.batch
        optimizer.zero_grad()
        session.backward(session.batch(batch))
        optimizer.step()
        schedule.step()
        course.stepped(batch)
        if warming is not None:
            warming.step()
        if along is not None:
            along.update(schedule.steps)
    made = cut(course.made, reached) if reached is not None else course.made
    points = along.record.points if along is not None else ()
    return {"reached": reached is not None, "made": made, "noise": encode(list(points))}


def ramp(batch: int, examples: float) -> list[tuple[int, int]]:
    """Stages (examples before, batch) of a batch that grows linearly over the first of so many examples."""
    part = max(1, batch // RAMP)
    sizes = [part * (i + 1) for i in range(batch // part)]
    return [(round(i * RAMPED * examples / len(sizes)), size) for i, size in enumerate(sizes)]


def derived(base: int, steps: float, readings: Sequence[Sequence[NoisePoint]], clock: Callable[[int], float]) -> Any:
    """The schedule from the readings of several runs together, at the examples of the fixed batch by the model."""
    points = sorted((p for run in readings for p in run), key=lambda p: p.first_step + p.last_step)
    course = course_of(Run("", None, trajectory=NoiseTrajectory(tuple(points), "per-example")), base)
    cost = min(4.0, plan_schedule(course, steps=steps, rate_rule=RULE).base_cost)
    found = plan_schedule(course, steps=steps, cost=cost, rate_rule=RULE)
    modelled = spent([(s.batch, s.steps) for s in found.stages], clock)
    return {"schedule": encode(found), "cost": cost, "modelled": modelled, "readings": len(points)}


def measure(name: str, store: Store, seeds: int) -> dict[str, Any]:
    """All of one problem, as far as it is not stored; its row of the table."""
    problem = PROBLEMS[name]
    workload = find(problem.workload, model=problem.model, options=list(problem.options))

    def swept() -> Any:
        found = measure_convergence(
            workload,
            list(problem.batches),
            ["tuned"],
            DERIVING,
            seed=DERIVE,
            target={"train": problem.target},
            optimizer=OPTIMIZER,
            rates=problem.rates,
            device="cpu",
            store=store.path.with_suffix(f".{name}.db"),
            resume=True,
            found=lambda line: print(f"{name} {line}", flush=True),
        )
        [curve] = found.curves
        points = [(p.batch, p.steps, p.learning_rate) for p in curve.points if p.status == "reached"]
        return {"points": points, "critical_batch": [curve.critical_batch, curve.low, curve.high]}

    def timed() -> Any:
        batches = sorted({*problem.batches, problem.batches[-1] * 2, max(1, problem.batches[0] // 2)})
        return {"load": os.getloadavg()[0], "step_ms": step_times(workload, batches)}

    points = store.piece(name, "sweep", swept)["points"]
    step_ms = store.piece(name, "times", timed)["step_ms"]
    clock = clock_of({int(batch): ms / 1e3 for batch, ms in step_ms.items()})
    base, steps, rate = min(points, key=lambda p: p[1] * clock(p[0]))
    most = LONGEST * base * steps

    def one(seed: int, stages: Any, **more: Any) -> dict[str, Any]:
        return train(workload, seed, rate, base, stages, problem.target, most, **more)

    readings = []
    for seed in range(DERIVE, DERIVE + DERIVING):
        run = store.piece(name, f"noise {base} {seed}", lambda seed=seed: one(seed, [(0, base)], noise=True))  # type: ignore[misc]
        readings.append([decode(NoisePoint, point, "noise") for point in run["noise"]])
    made = store.piece(name, f"derived {base}", lambda: derived(base, steps, readings, clock))
    schedule = decode(Schedule, made["schedule"], "schedule")
    warm = {"warm-up": max(2, round(WARM * steps))}
    stages = {"schedule": schedule, "ramp": ramp(base, base * steps)}
    runs: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    for seed in range(JUDGE, JUDGE + seeds):
        for arm in ARMS:
            runs[arm][str(seed)] = store.piece(
                name,
                f"{arm} {base} {seed}",
                lambda arm=arm, seed=seed: one(seed, stages.get(arm, [(0, base)]), warm=warm.get(arm, 0)),  # type: ignore[misc]
            )
    fixed = {batch: taken * clock(batch) for batch, taken, _ in points}
    return {
        "problem": asdict(problem),
        "fixed_batch": base,
        "at_edge": base in (min(fixed), max(fixed)),
        "rate": rate,
        "seconds_by_batch": fixed,
        "critical_batch": store.found[name]["sweep"]["critical_batch"],
        "step_ms": step_ms,
        "schedule": [(s.first_example, s.batch) for s in schedule.stages],
        "steps_saved_modelled": [schedule.steps_saved, schedule.steps_saved_low, schedule.steps_saved_high],
        "cost": made["cost"],
        "answer": str(schedule),
        "processor_s": sum(store.found[name]["processor_s"].values()),
        **against_fixed(runs, clock),
    }


def told(name: str, row: Mapping[str, Any]) -> str:
    """A row of the table in Markdown: an arm a line."""
    lines = []
    for arm, found in row["against_fixed"].items():
        cells = [
            f"{each['ratio']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" if each["ratio"] else each["reason"]
            for each in (found[figure] for figure in FIGURES)
        ]
        lines.append(f"| {name} | {row['fixed_batch']} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--store", type=Path, default=Path("schedule-store.json"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    store, rows = Store(given.store), {}
    print("| problem | fixed | against it | steps | examples | device-seconds |\n|---|--:|---|--:|--:|--:|")
    for name in given.problems:
        rows[name] = measure(name, store, given.seeds)
        print(told(name, rows[name]), flush=True)
        print(f"  {name}: {rows[name]['answer']}", flush=True)
        if given.output is not None:
            device = {"device": describe(CPU).name, "threads": 1, "torch": torch.__version__, "goal": GOAL}
            given.output.write_text(json.dumps({**device, "problems": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
