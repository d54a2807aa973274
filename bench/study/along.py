"""The noise scale along trainings at one batch size: about the critical batch, at the rate that a sweep tuned there."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import torch
from schedule import train

from pybatch.base.codec import decode
from pybatch.commands.saved import read_run
from pybatch.device.environment import capture
from pybatch.records import Convergence, ConvergencePoint, NoisePoint, NoiseTrajectory, Note, Run
from pybatch.workloads.running.finding import find
from study.declaration import Record

PASSES = (8, 4)  # micro-batches of a step, the first that divides it: their norms against that of their mean
LONGEST = 4.0  # times the examples of the sweep, after which a training is given up


def measure(record: Record, path: Path) -> bool:
    """Train and write the record; whether there was a sweep to take batch and rate from."""
    own, seed = path.with_name(f"{record.problem.name}-own.json"), int(record.flags[0])
    steps = read_run(own).convergence if own.exists() else None
    found = chosen(steps) if steps is not None else None
    if found is None:
        return False
    point, target = found
    assert point.learning_rate is not None
    assert point.steps is not None
    torch.set_num_threads(1)
    workload = find(record.problem.workload, model=record.problem.model, options=list(record.problem.options))
    most = LONGEST * point.batch * point.steps
    parts = next(parts for parts in PASSES if point.batch % parts == 0)
    done = train(workload, seed, point.learning_rate, point.batch, [(0, point.batch)], target, most, parts=parts)
    said = Note(
        "trajectory",
        f"batch {point.batch}, rate {point.learning_rate:g}, to train loss {target:g}"
        f"{'' if done['reached'] else ', which was not reached'}",
    )
    made = Run(
        datetime.now(UTC).isoformat(timespec="seconds"),
        capture(seed=seed),
        trajectory=NoiseTrajectory(tuple(decode(NoisePoint, each, "noise") for each in done["noise"]), "gradients"),
        notes=(said,),
    )
    path.write_text(json.dumps(json.loads(made.to_json()), separators=(",", ":")) + "\n")
    return True


def chosen(steps: Convergence) -> tuple[ConvergencePoint, float] | None:
    """The point of a tuned sweep nearest its critical batch that can be split into passes, and its target."""
    for curve in steps.curves:
        if curve.rule == "tuned" and curve.split == "train" and curve.critical_batch and curve.target is not None:
            aim = math.log(curve.critical_batch)
            able = [p for p in curve.points if p.steps and p.learning_rate and p.batch % PASSES[-1] == 0]
            if able:
                return min(able, key=lambda p: abs(math.log(p.batch) - aim)), curve.target
    return None
