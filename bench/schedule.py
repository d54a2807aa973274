"""Does a batch-size schedule pay? Trainings to a target by a schedule against a fixed batch, seed by seed.

    python bench/schedule.py [--problems digits-mlp ...] [--against fastest] [--seeds N] [--store FILE] [--output FILE]

Each problem: a sweep with the rate tuned at every batch size (seeds from 0) and step times of one thread give the
fastest fixed batch, that of the least steps times step time, and a frugal one, about a fifth of the critical batch.
Trainings at it read the noise scale along them (the same seeds), and `answer/schedule.py` makes a schedule of that, at
the examples that the fixed batch takes by its model. Out of sample, on other seeds (from 1000), these are trained to
the same target, with rates by the square root of the batch:

    fixed      that batch at its tuned rate
    schedule   the stages
    ramp       the same batch from an eighth of it on, linearly over the first half of the examples
    warm-up    the same batch, its rate rising linearly over a tenth of the steps

Seconds are modelled: step times measured once, in processor time of the one thread, which neighbours leave alone, and
summed over the steps. What is measured goes to the store at once, and a second run goes on from there.
Goal: 0.80 of the fastest batch's steps at 1.05 of its examples, on two of four problems.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import FIGURES, GOAL, Course, Store, against_fixed, clock_of, cut, spent

from pybatch.answer.course import course_of
from pybatch.answer.schedule import plan_schedule
from pybatch.base.codec import decode, encode
from pybatch.device.identity import describe
from pybatch.noise import Trajectory
from pybatch.noise.attachment import NoiseSource, attach
from pybatch.records import NoisePoint, NoiseTrajectory, Run, Schedule
from pybatch.schedule import BatchSchedule
from pybatch.sweep.measurement import measure_convergence
from pybatch.training.trajectory import next_evaluation
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session, fixed_batches

OPTIMIZER, RULE = "adamw", "sqrt"
DERIVE, JUDGE = 0, 1000  # first seeds of what a schedule is derived from, and of what it is judged on
DERIVING = 3
LONGEST = 4.0  # times the examples of the fixed batch, after which a run is given up
RAMP, RAMPED = 8, 0.5  # steps of a ramped batch, and the share of the examples that they are spread over
WARM = 0.1  # share of the steps in which a rate is warmed up
ARMS = {"fastest": ("fixed", "schedule", "ramp", "warm-up"), "frugal": ("fixed", "schedule")}
FRUGAL = 0.2  # times the critical batch: a fifth more examples than the fewest
FEWER = 6  # seeds against the frugal batch
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
    parts: int = 1  # passes of a step whose noise is read; 1: that of its examples' own gradients


PROBLEMS = {
    "digits-mlp": Problem("digits", "mlp", 0.03, (16, 32, 64, 128, 256, 512, 1024)),
    "digits-cnn": Problem("digits", "cnn", 0.03, (16, 32, 64, 128, 256)),
    "text-lstm": Problem("text", "lstm", 2.1, (8, 16, 32, 64, 128, 256), parts=8),
    "text-transformer": Problem("text", "transformer", 2.1, (8, 16, 32, 64, 128, 256), parts=8),
}


def digest(problem: Problem, workload: Workload) -> str:
    """Of all that trainings depend on: what was measured of a problem that has changed is not taken for this one's."""
    info = asdict(Session(workload, CPU).info)
    how = [OPTIMIZER, RULE, DERIVE, JUDGE, DERIVING, LONGEST, RAMP, RAMPED, WARM]
    return hashlib.sha256(json.dumps([asdict(problem), info, how], default=str).encode()).hexdigest()[:8]


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
    parts: int = 0,
) -> dict[str, Any]:
    """One training to the target, or to so many examples: the steps made of each batch size.

    Args:
        rate: at the base batch; it follows the batch by RULE.
        warm: steps in which the rate rises linearly from nothing.
        parts: read the noise scale along it: of so many passes a step, or of exact per-example gradients where it is 1.
    """
    session = Session(workload, CPU, seed=seed)
    optimizer = session.optimizer_of(OPTIMIZER, {"lr": rate})
    warming = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm - 1) if warm > 1 else None
    batches = [s.batch for s in stages.stages] if isinstance(stages, Schedule) else [batch for _, batch in stages]
    schedule = BatchSchedule(stages, optimizer, base_batch=base, micro_batch=math.gcd(*batches), rate=RULE)
    source: NoiseSource = "micro-batches" if parts > 1 else "per-example"
    handle = attach(session.model, optimizer, source, every=1) if parts else None
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
        passes = max(1, parts)
        for _ in range(passes):
            session.backward(session.batch(batch // passes), 1 / passes)
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
    course = course_of(Run("", None, trajectory=NoiseTrajectory(tuple(points), "gradients")), base)
    cost = min(4.0, plan_schedule(course, steps=steps, rate_rule=RULE).base_cost)
    found = plan_schedule(course, steps=steps, cost=cost, rate_rule=RULE)
    modelled = spent([(s.batch, s.steps) for s in found.stages], clock)
    return {"schedule": encode(found), "cost": cost, "modelled": modelled, "readings": len(points)}


def measure(name: str, store: Store, seeds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """All of one problem, as far as it is not stored; its rows of the table by the fixed batch."""
    problem = PROBLEMS[name]
    workload = find(problem.workload, model=problem.model, options=list(problem.options))
    kept = f"{name}-{digest(problem, workload)}"  # under which name it is stored
    piece = partial(store.piece, kept)

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
            store=store.path.with_suffix(f".{kept}.db"),
            resume=True,
            found=lambda line: print(f"{name} {line}", flush=True),
        )
        [curve] = found.curves
        points = [(p.batch, p.steps, p.learning_rate) for p in curve.points if p.status == "reached"]
        return {"points": points, "critical_batch": [curve.critical_batch, curve.low, curve.high]}

    def timed() -> Any:
        batches = sorted({*problem.batches, problem.batches[-1] * 2, max(1, problem.batches[0] // 2)})
        return {"load": os.getloadavg()[0], "step_ms": step_times(workload, batches)}

    sweep = piece("sweep", swept)
    step_ms = piece("times", timed)["step_ms"]
    clock = clock_of({int(batch): ms / 1e3 for batch, ms in step_ms.items()})
    seconds = {batch: steps * clock(batch) for batch, steps, _ in sweep["points"]}
    rows = {
        kind: judge(
            problem, workload, piece, point, clock, seeds if kind == "fastest" else min(seeds, FEWER), ARMS[kind]
        )
        for kind, point in fixed_batches_of(sweep["points"], sweep["critical_batch"][0], clock).items()
        if kind in kinds
    }
    return {
        "problem": asdict(problem),
        "critical_batch": sweep["critical_batch"],
        "step_ms": step_ms,
        "seconds_by_batch": seconds,
        "against": rows,
        "processor_s": sum(store.found[kept]["processor_s"].values()),
    }


Point = tuple[int, float, float]  # batch, steps, rate


def fixed_batches_of(points: Sequence[Point], critical: float, clock: Callable[[int], float]) -> dict[str, Point]:
    """Those of a sweep that schedules are held against, by kind."""
    ascending = sorted(points)
    small = [point for point in ascending if point[0] <= FRUGAL * critical]
    fastest = min(ascending, key=lambda point: point[1] * clock(point[0]))
    frugal = small[-1] if small else ascending[0]
    return {"fastest": fastest} | ({"frugal": frugal} if frugal != fastest else {})


def judge(
    problem: Problem,
    workload: Workload,
    piece: Callable[[str, Callable[[], Any]], Any],
    point: Point,
    clock: Callable[[int], float],
    seeds: int,
    arms: Sequence[str],
) -> dict[str, Any]:
    """A schedule derived from runs at a fixed batch, and trainings by it and by others against that batch."""
    base, steps, rate = point

    def one(seed: int, stages: Schedule | Sequence[tuple[int, int]], **more: int) -> dict[str, Any]:
        most = LONGEST * base * steps
        return train(workload, seed, rate, base, stages, problem.target, most, **more)

    fixed, readings = [(0, base)], []
    for seed in range(DERIVE, DERIVE + DERIVING):
        run = piece(f"noise {base} {seed}", partial(one, seed, fixed, parts=problem.parts))
        readings.append([decode(NoisePoint, each, "noise") for each in run["noise"]])
    made = piece(f"derived {base}", partial(derived, base, steps, readings, clock))
    schedule = decode(Schedule, made["schedule"], "schedule")
    how: dict[str, Callable[[int], Any]] = {
        "fixed": lambda seed: one(seed, fixed),
        "schedule": lambda seed: one(seed, schedule),
        "ramp": lambda seed: one(seed, ramp(base, base * steps)),
        "warm-up": lambda seed: one(seed, fixed, warm=max(2, round(WARM * steps))),
    }
    runs: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    for seed in range(JUDGE, JUDGE + seeds):
        for arm in arms:
            runs[arm][str(seed)] = piece(f"{arm} {base} {seed}", partial(how[arm], seed))
    return {
        "fixed_batch": base,
        "at_edge": base in (min(problem.batches), max(problem.batches)),
        "rate": rate,
        "schedule": [(s.first_example, s.batch) for s in schedule.stages],
        "steps_saved_modelled": [schedule.steps_saved, schedule.steps_saved_low, schedule.steps_saved_high],
        "cost": made["cost"],
        "answer": str(schedule),
        **against_fixed(runs, clock),
    }


def told(name: str, kind: str, row: Mapping[str, Any]) -> str:
    """Rows of the table in Markdown: an arm a line."""
    lines = []
    for arm, found in row["against_fixed"].items():
        cells = [
            f"{each['ratio']:.2f} [{each['low']:.2f}, {each['high']:.2f}]" if each["ratio"] else each["reason"]
            for each in (found[figure] for figure in FIGURES)
        ]
        sizes = " → ".join(str(batch) for _, batch in row["schedule"]) if arm == "schedule" else ""
        lines.append(f"| {name} | {kind}, {row['fixed_batch']} | {arm} {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def declared(name: str) -> Any:
    """A problem as a record has it."""
    return json.loads(json.dumps(asdict(PROBLEMS[name])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--against", nargs="*", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--store", type=Path, default=Path("schedule-store.json"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(given.store)
    output: Path | None = given.output
    before = json.loads(output.read_text())["problems"] if output is not None and output.exists() else {}
    rows = {name: row for name, row in before.items() if name in PROBLEMS and declared(name) == row.get("problem")}
    print("| problem | fixed batch | against it | steps | examples | device-seconds |\n|---|---|---|--:|--:|--:|")
    for name in given.problems:
        rows[name] = measure(name, store, given.seeds, given.against)
        for kind, row in rows[name]["against"].items():
            print(told(name, kind, row), flush=True)
        if output is not None:
            device = {"device": describe(CPU).name, "threads": 1, "torch": torch.__version__, "goal": GOAL}
            output.write_text(json.dumps({**device, "problems": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
