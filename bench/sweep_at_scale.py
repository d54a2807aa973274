"""The critical batch of a Transformer, tuned at batches to 2^13, against the batch that saturates this device.

    python bench/sweep_at_scale.py [--device cuda|cpu] [--seconds 430] [--kept DIR] [--output FILE]

First the capacity on the workload, then tuned sweeps over one store, each adding to the one before: every fourth
batch size with two seeds, then every second one, then a third seed. When the time ends, the sweep at work is
interrupted, and what stands is put together from the store: every batch size that is over, and the verdict. A later
call with the same --kept goes on: a capacity that stands is kept, of the sweeps only what is missing runs, also where
the call before was killed. DIR gets `sweep_at_scale.db`, the store (beside it -wal and -shm after a kill: keep all
three together), and `sweep_at_scale_capacity.json`.

What it should take on an H200, worked out beforehand and not measured; 6 P T is 4.1 GFLOP a sequence (flop_counter):
    Transformer "small", 10.9 M parameters, 64 bytes a sequence. At batch 8192: 34 TFLOP a step, 0.08 s at half of 0.8
    PFLOP/s in bf16; activations moved, about 0.4 TB, 0.09 s at 4.3 TB/s: 0.17 s in all, 21 us a sequence.
    Steps to train loss 2.0, "tiny" on a CPU (one seed, best of one or two rates): 600, 240 and 160 at batches 8, 32
    and 128, a hyperbola of S_min 130 and B_c 29; above 160 at 512. "small" was seen to learn at 0.001 and hardly at
    0.003 within its first 30 to 50 steps at batch 16; its steps to the target are taken to be those of "tiny". A race
    of 4 rates and 2 seeds costs some 10 trials of S_min steps each where the batch is far above that: 10 x 130 x 0.17 s
    = 220 s at 8192, 55 s at 2048, 14 s at 512. Below, launches
    rule: a stack of 4 replicas some 15 ms a step, three heats of 200 to 1000 steps each: 10 to 45 s a batch size.
    The first sweep: about 370 s; the second about 190 s more, most of them at 4096. Hence a second call.
    This CPU, at 50 GFLOP/s a core, would take 11 minutes for one step at 8192, and ten days for that batch size.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "sweep_at_scale"
GRACE_S = 20.0  # for an interrupted sweep to write its record
REPORT_S = 20.0  # kept for putting the record together
LEAST_S = 15.0  # a part that is given less shows nothing
DONE, FAILED, INCOMPLETE, INTERRUPTED = 0, 1, 3, 130  # exit statuses of pybatch; the last: before anything was measured


@dataclass(frozen=True)
class Scale:
    """What is swept. The smallest batch is the base in every sweep, so that all have one limit of steps."""

    workload: tuple[str, ...]
    sweep: tuple[str, ...]
    passes: tuple[tuple[str, ...], ...]
    capacity: tuple[str, ...]


GPU = Scale(
    workload=("--workload", "text", "--option", "size=small", "--option", "length=64", "--dtype", "bf16"),
    sweep=(
        "--optimizer",
        "adamw",
        "--target",
        "train=2",
        "--rates",
        "0.00025,0.0005,0.001,0.002",
        "--max-steps",
        "3000",
    ),
    passes=(
        ("--batch", "8-8192*4", "--seeds", "2"),
        ("--batch", "8-8192*2", "--seeds", "2"),
        ("--batch", "8-8192*2", "--seeds", "3"),
    ),
    capacity=("--time-budget", "45"),
)
TOY = Scale(  # the same parts within a minute
    workload=("--workload", "digits"),
    sweep=("--target", "train=1.2", "--rates", "0.0625,0.25,1", "--max-steps", "2000"),
    passes=(("--batch", "4-64*4", "--seeds", "2"), ("--batch", "4-64*2", "--seeds", "2")),
    capacity=("--time-budget", "12", "--batch", "8,64,512,4096"),
)


class Stage:
    """The parts, one process each.

    Args:
        place: flags that name the device.
        scale: what is swept.
        kept: folder of what a later call goes on with.
        seconds: after which nothing runs any more.
    """

    def __init__(self, place: tuple[str, ...], scale: Scale, kept: Path, seconds: float) -> None:
        self.place, self.scale, self.kept = place, scale, kept
        self.end = time.monotonic() + seconds
        self.store, self.capacity = kept / f"{NAME}.db", kept / f"{NAME}_capacity.json"
        self.parts: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds, without those of putting the record together."""
        return self.end - REPORT_S - time.monotonic()

    def run(self, part: str, *arguments: str) -> str:
        """Run a command of pybatch, interrupted when the time ends; "ok", "incomplete", "failed" or "skipped"."""
        if self.left() < LEAST_S:
            return self._note(part, "skipped", 0.0)
        start = time.monotonic()
        print(f"{part}: pybatch {' '.join(arguments)}", flush=True)
        process = subprocess.Popen([sys.executable, "-m", "pybatch", *arguments])
        try:
            code = process.wait(max(1.0, self.left() - GRACE_S))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends in good order, with what stands
            try:
                code = process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()  # what it has stored stands
                code = process.wait()
        status = {DONE: "ok", INCOMPLETE: "incomplete", INTERRUPTED: "incomplete"}.get(
            code, f"failed with status {code}"
        )
        return self._note(part, status, time.monotonic() - start)

    def _note(self, part: str, status: str, seconds: float) -> str:
        self.parts.append({"part": part, "status": status, "seconds": round(seconds, 1)})
        return status

    def measure(self) -> None:
        """Capacity, then the sweeps; the first that does not end is the last."""
        if self.capacity.exists():
            self._note("capacity", "kept from an earlier call", 0.0)
        else:
            self.run(
                "capacity",
                "bench",
                *self.place,
                *self.scale.workload,
                *self.scale.capacity,
                "--quiet",
                "--resume",
                "-o",
                str(self.capacity),
            )
        for number, chosen in enumerate(self.scale.passes, 1):
            flags = [*self.place, *self.scale.workload, *self.scale.sweep, *chosen, "--noise-budget", "0", "--quiet"]
            if self.run(f"sweep {number}", "sweep", *flags, "--store", str(self.store), "--resume") != "ok":
                break

    def record(self, target: Path) -> dict[str, Any]:
        """Capacity and every batch size that is over, as one record with its verdict; {} where there is neither."""
        files = [str(path) for path in (self.capacity, self.store) if path.exists()]
        if not files:
            return {}
        done = _report(files, target)
        if done.returncode and self.capacity.exists():  # a store in which nothing stands yet
            self._note("report", f"without the sweep: {done.stderr.strip()}", 0.0)
            done = _report([str(self.capacity)], target)
        found: dict[str, Any] = json.loads(target.read_text()) if done.returncode == 0 else {}
        return found


def _report(files: list[str], target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pybatch", "report", *files, "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def answer(record: dict[str, Any]) -> dict[str, Any]:
    """The question's figures out of a record: the critical batch over the saturation batch, and the points."""
    capacity, verdict = record.get("capacity") or {}, record.get("verdict") or {}
    curves = (record.get("convergence") or {}).get("curves") or []
    critical, saturation = verdict.get("critical_batch"), verdict.get("saturation_batch")
    return {
        "critical_batch": [verdict.get(key) for key in ("critical_batch", "critical_low", "critical_high")],
        "critical_source": verdict.get("critical_source"),
        "saturation_batch": [capacity.get(f"saturation_{key}") for key in ("batch", "low", "high")],
        "critical_over_saturation": critical / saturation if critical and saturation else None,
        "points": {p["batch"]: [p["steps"], p["learning_rate"]] for curve in curves for p in curve["points"]},
        "text": verdict.get("text"),
    }


def exit_status(statuses: list[str], critical: float | None) -> int:
    """1 where a part failed, or all ran and there is no answer; 3 where a later call has something to go on with."""
    if any(status.startswith("failed") for status in statuses):
        return FAILED
    if any(status in ("incomplete", "skipped") for status in statuses):
        return INCOMPLETE
    return DONE if critical is not None else FAILED


def main() -> int:
    """Measure, put together, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the parts at a toy scale")
    parser.add_argument("--seconds", type=float, default=430.0, help="for everything")
    parser.add_argument("--kept", type=Path, default=Path(), help="folder of what a later call goes on with")
    parser.add_argument("--output", type=Path, help="write the figures here (JSON)")
    arguments = parser.parse_args()
    arguments.kept.mkdir(parents=True, exist_ok=True)
    place, scale = (("--cpu",), TOY) if arguments.device == "cpu" else (("--gpu", "0"), GPU)
    stage = Stage(place, scale, arguments.kept, arguments.seconds)
    stage.measure()
    record = stage.record(arguments.kept / f"{NAME}.json")
    figures = {"parts": stage.parts} | answer(record)
    print(json.dumps(figures, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures | {"record": record}, indent=2) + "\n")
    return exit_status([part["status"] for part in stage.parts], figures["critical_batch"][0])


if __name__ == "__main__":
    sys.exit(main())
