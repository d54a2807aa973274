"""Optimizer steps of two checkouts against each other, row by row: time of the new one over that of the old.

    python bench/checkouts.py OLD/.venv/bin/python NEW/.venv/bin/python [--rounds 5] [--limit 210] [--output FILE]

Each Python has its own pybatch. Two processes wait for each other: samples of at least 20 ms in turns A B B A and
B A A B. A round has new processes and new memory, since where memory lies makes a tenth; a row's 95 % interval is
Student's over the rounds' mean log ratios. The same Python twice gives what can't be told from nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from paired import geometric_mean

M = 1 << 20
SHAPES = {
    "1000 of 2": [(2,)] * 1000,
    "1000 of 64x64": [(64, 64)] * 1000,
    "8 of 1 M": [(1024, 1024)] * 8,
    "one of 16 M": [(16 * M,)],
}
CLIP = {"max_grad_norm": 1.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "AdamW, clipped": ("AdamW", CLIP),
    "AdamW, noise": ("AdamW", CLIP | {"noise": True}),
    "AdamW, bf16 with masters, clipped": ("AdamW", CLIP | {"master_weights": True}),
    "Adam, clipped": ("Adam", CLIP),
    "SGD, clipped": ("SGD", CLIP | {"momentum": 0.9}),
    "Lion, clipped": ("Lion", CLIP),
    "LARS, clipped": ("LARS", CLIP | {"momentum": 0.9}),
    "LAMB, clipped": ("LAMB", CLIP),
}
SMALL = ("AdamW", "AdamW, clipped", "AdamW, noise", "LAMB, clipped")
ROWS = [
    *((kind, "1000 of 2") for kind in SMALL[:2]),
    *((kind, "1000 of 64x64") for kind in SMALL),
    ("AdamW", "one of 16 M"),
    *((kind, "8 of 1 M") for kind in KINDS if kind != "AdamW"),
]
SAMPLE_S = 0.02
CLOCKS = ("wall", "processor")


class Side:
    """A checkout's process."""

    def __init__(self, python: str) -> None:
        command = [python, __file__, "side"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answer() -> None:
    """In a checkout's process: make a row, and time so many of its steps, as often as asked."""
    import torch
    from tensors import gradients, parameters

    from pybatch import optim

    def made(kind: str, shape: str) -> Any:
        name, options = KINDS[kind]
        dtype = torch.bfloat16 if "master_weights" in options else torch.float32
        params = parameters(SHAPES[shape], torch.device("cpu"), dtype)
        optimizer = getattr(optim, name)(params, lr=1e-4, **options)
        micro = [gradients(params, seed) for seed in range(2 if options.get("noise") else 1)]

        def step() -> None:
            for given in micro if len(micro) > 1 else []:
                for param, grad in zip(params, given, strict=True):
                    param.grad = grad
                optimizer.accumulate(4)
            optimizer.step()

        for param, grad in zip(params, micro[0], strict=True):
            param.grad = grad
        for _ in range(2):
            step()
        return step

    step: Any = None
    for line in sys.stdin:
        words, said = json.loads(line), None
        if len(words) == 2:
            step = None  # its memory goes first
            step = made(*words)
        else:
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(words[0]):
                step()
            said = [(time.perf_counter() - wall) / words[0], (time.process_time() - processor) / words[0]]
        print(json.dumps(said), flush=True)


def round_of(pythons: tuple[str, str], swapped: bool, turns: int) -> dict[tuple[str, str], list[float]]:
    """Mean log ratio of both clocks and the least new milliseconds, by row."""
    found = {}
    sides = [Side(python) for python in pythons]
    for row in ROWS:
        for side in reversed(sides) if swapped else sides:
            side.ask(*row)
        steps = max(1, int(SAMPLE_S / sides[1].ask(1)[0]))
        ratios, least = [], math.inf
        for turn in range(turns):
            seconds: tuple[list[Any], list[Any]] = ([], [])
            for which in (0, 1, 1, 0) if (turn + swapped) % 2 else (1, 0, 0, 1):
                time.sleep(0.005)  # the other's threads have stopped spinning
                seconds[which].append(sides[which].ask(steps))
            old, new = (np.log(side).mean(axis=0) for side in seconds)
            ratios.append(new - old)
            least = min(least, *(wall for wall, _ in seconds[1]))
        found[row] = [*np.median(ratios, axis=0).tolist(), 1e3 * least]
    for side in sides:
        side.end()
    return found


def interval(logs: np.ndarray) -> tuple[float, float | None, float | None]:
    """Geometric mean with its 95 % interval; without ends where there was one round."""
    return geometric_mean(logs) if len(logs) > 1 else (math.exp(float(logs[0])), None, None)


def told(name: str, ms: str, found: tuple[float, float | None, float | None]) -> str:
    mean, low, high = found
    ends = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    word = "  slower" if low and low > 1 else "  faster" if high and high < 1 else ""
    return f"  {name:50} {ms:>10}  {mean:.3f}{ends}{word}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="the Python of the old checkout's environment")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=6, help="of four samples, a row and round")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds past which no round is begun")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    begin, rounds = time.monotonic(), []
    while len(rounds) < given.rounds and (time.monotonic() - begin) * (1 + 1 / max(1, len(rounds))) <= given.limit:
        rounds.append(round_of((given.old, given.new), bool(len(rounds) % 2), given.turns))
    result: dict[str, Any] = {"rounds": len(rounds)}
    for i, clock in enumerate(CLOCKS):
        print(f"new over old, {clock} time, {len(rounds)} rounds")
        logs = np.array([[found[row][i] for row in ROWS] for found in rounds])
        rows = {", ".join(row): interval(logs[:, place]) for place, row in enumerate(ROWS)}
        for row, name in zip(ROWS, rows, strict=True):
            print(told(name, f"{min(found[row][2] for found in rounds):.2f} ms", rows[name]))
        result[clock] = rows | {"geometric mean": interval(logs.mean(axis=1))}
        print(told("geometric mean", "", result[clock]["geometric mean"]))
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    answer() if sys.argv[1:] == ["side"] else main()
