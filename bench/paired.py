"""Trainings to a target, paired by seed: what each of them spent, and ratios with their intervals."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pybatch.training.trajectory import crossing_at

GOAL = {"steps": 0.80, "examples": 1.05}
FIGURES = ("steps", "examples", "seconds")


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
    """Geometric mean of ours over theirs, paired by seed, with Student's 95 % interval of the mean log ratio.

    Args:
        ours, theirs: by seed; None: the target was not reached, after which there is no ratio but a reason.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    missed = [sum(side[seed] is None for seed in seeds) for side in (ours, theirs)]
    if len(seeds) < 2 or any(missed):
        why = f"{missed[0]} and {missed[1]} of {len(seeds)} did not reach the target"
        return {"ratio": None, "low": None, "high": None, "seeds": len(seeds), "reason": why}
    logs = np.array([math.log(float(ours[seed] or 0) / float(theirs[seed] or 0)) for seed in seeds])
    mean, low, high = geometric_mean(logs)
    return {"ratio": mean, "low": low, "high": high, "seeds": len(seeds)}


def geometric_mean(logs: np.ndarray) -> tuple[float, float, float]:
    """Of two or more ratios, from their logarithms, with Student's 95 % interval."""
    mean = float(logs.mean())
    half = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


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
