"""`pybatch bench` several times on the same machine: do the runs agree within the intervals that each of them states?

    python bench/repeatability.py [--runs 2] [--output FILE] [-- FLAGS OF PYBATCH BENCH]

Each run is a process of its own. For the ceiling, the half batch and the saturation batch, and for the step time of
each batch size: is every run's value inside the interval of every other run? A 95 % interval of one run is meant to
hold the true value; two measured values differ by more than one does from the truth, so that agreement in every case
is a stricter demand than the intervals promise. The load of the machine before and after each run is in the output,
since a disturbed machine repeats nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pybatch.records import Run

# What is compared: figure, its interval's ends.
FIGURES = {
    "ceiling": ("ceiling_low", "ceiling_high"),
    "half_batch": ("half_low", "half_high"),
    "saturation_batch": ("saturation_low", "saturation_high"),
}


def measure(flags: Sequence[str], limit_s: float) -> dict[str, Any]:
    """One run in a fresh process: its record, seconds from start to verdict, and the load around it."""
    with tempfile.TemporaryDirectory(prefix="pybatch-repeat-") as folder:
        path = Path(folder) / "run.json"
        before, start = os.getloadavg()[0], time.monotonic()
        command = [sys.executable, "-m", "pybatch", "bench", *flags, "--quiet", "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        seconds = time.monotonic() - start
        if not path.exists():
            raise SystemExit(f"repeatability: {' '.join(command)} gave no record:\n{done.stderr}")
        run = Run.from_json(path.read_text())
    return {
        "run": run,
        "seconds": seconds,
        "status": done.returncode,
        "load_before": before,
        "load_after": os.getloadavg()[0],
    }


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """For every figure, each run's value with its interval, and whether all values are in all intervals."""
    fits = [run.capacity.model if run.capacity else None for run in runs]
    figures: dict[str, Any] = {}
    for name, (low, high) in FIGURES.items():
        values = [None if fit is None else [getattr(fit, key) for key in (name, low, high)] for fit in fits]
        figures[name] = {"runs": values} | agreement([v for v in values if v is not None])
    return {"figures": figures, "step_ms": _steps(runs)}


def agreement(values: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Of (value, low, high) of each run: spread of the values, and how many pairs (value, other's interval) agree.

    An end of None is open.
    """
    pairs = list(itertools.permutations(values, 2))
    inside = sum(_within(mine[0], theirs) for mine, theirs in pairs)
    known = [value[0] for value in values if value[0] is not None]
    spread = max(known) / min(known) - 1 if len(known) > 1 and min(known) > 0 else None
    return {"spread": spread, "pairs": len(pairs), "inside": inside, "agree": bool(pairs) and inside == len(pairs)}


def _within(value: float | None, interval: Sequence[float | None]) -> bool:
    _, low, high = interval
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def _steps(runs: Sequence[Run]) -> dict[str, Any]:
    """Step times of the batch sizes that every run timed: where do the runs' own intervals disagree, by how much?"""
    tables = [{p.batch: p for p in run.capacity.batches if p.step_ms} if run.capacity else {} for run in runs]
    common = sorted(set.intersection(*map(set, tables))) if tables else []
    points = []
    for batch in common:
        values = [[p.step_ms, p.step_ms_low, p.step_ms_high] for p in (table[batch] for table in tables)]
        points.append({"batch": batch, "runs": values} | agreement(values))
    inside, pairs = (sum(p[key] for p in points) for key in ("inside", "pairs"))
    return {"points": points, "inside": inside, "pairs": pairs}


def report(measured: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """The result in lines."""
    lines = []
    for i, entry in enumerate(measured):
        text = f"run {i + 1}: {entry['seconds']:.0f} s to the verdict, exit {entry['status']}"
        lines.append(f"{text}, load {entry['load_before']:.1f} -> {entry['load_after']:.1f}")
    for name, figure in found["figures"].items():
        values = ", ".join(
            "none" if v is None else f"{v[0]:.4g} [{_text(v[1])}, {_text(v[2])}]" for v in figure["runs"]
        )
        spread = "" if figure["spread"] is None else f"; spread {figure['spread']:.1%}"
        lines.append(f"{name:17} {values}{spread}; {'agree' if figure['agree'] else 'DISAGREE'}")
    steps = found["step_ms"]
    lines.append(f"step times: {steps['inside']} of {steps['pairs']} values lie in another run's interval")
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "open" if value is None else f"{value:.4g}"


def main() -> int:
    """Run, compare, print and write; exit status 1 where the ceiling or the saturation batch disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a run may take")
    parser.add_argument("--output", type=Path, help="JSON with the comparison and every record")
    parser.add_argument("flags", nargs="*", help="after --: of pybatch bench, such as --cpu --workload text")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error(f"--runs {arguments.runs}: one run repeats nothing. Give 2 or more.")
    measured = [measure(arguments.flags, arguments.limit) for _ in range(arguments.runs)]
    found = compare([entry["run"] for entry in measured])
    print(report(measured, found))
    if arguments.output is not None:
        whole = [{**entry, "run": json.loads(entry["run"].to_json())} for entry in measured]
        arguments.output.write_text(
            json.dumps({"flags": arguments.flags} | found | {"measured": whole}, indent=2) + "\n"
        )
    return int(not all(found["figures"][name]["agree"] for name in ("ceiling", "saturation_batch")))


if __name__ == "__main__":
    sys.exit(main())
