"""What each piece of stacking gains: one model, images folded into channels, pools without an index, choosing.

One unit of work is what a trial repeats: INTERVAL steps and an evaluation, for 36 replicas. The forms take turns, and
each figure is the median of the ratios of successive turns to the plain loop.

    python bench/stacking.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from sweep import INTERVAL, trials

from pybatch.training import stack
from pybatch.training.choosing import choose
from pybatch.training.loop import Loop
from pybatch.training.replicas import Replicas
from pybatch.training.stack import Stack
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")
CASES = [("mlp", 16), ("mlp", 64), ("cnn", 16), ("cnn", 64)]


@contextmanager
def torchs_pools(wanted: bool) -> Iterator[None]:
    """Evaluations with torch's own max pooling, where wanted."""

    class Off(stack.Pooling):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with mock.patch.object(stack, "Pooling", Off) if wanted else nullcontext():
        yield


def measured(model: str, batch: int, repeats: int) -> str:
    """One row of the table."""
    workload, some = find("digits", model=model), trials(model, batch)

    def stacked(folded: bool) -> Stack:
        made = Stack(workload, some, CPU)
        made.folded = folded
        return made

    forms: dict[str, tuple[Replicas, bool]] = {
        "loop": (Loop(workload, some, CPU), False),
        "stack": (stacked(False), True),
        "folded": (stacked(True), True),
        "pools": (stacked(True), False),
    }

    def turn(replicas: Replicas, plain_pools: bool) -> float:
        start = time.perf_counter()
        with torchs_pools(plain_pools):
            replicas.advance(INTERVAL)
            replicas.evaluate()
        return time.perf_counter() - start

    samples: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        turn(*form)  # what is chosen by the first use is chosen
    for _ in range(repeats):
        for name, form in forms.items():
            samples[name].append(turn(*form))
    start = time.perf_counter()
    choose(workload, some, CPU)
    choosing = time.perf_counter() - start
    loop = samples["loop"]
    repaid = choosing / max(1e-9, statistics.median(loop) - min(statistics.median(s) for s in samples.values()))
    ratios = {name: statistics.median(a / b for a, b in zip(loop, own, strict=True)) for name, own in samples.items()}
    cells = [f"{ratios[name]:.2f}x" for name in ("stack", "folded", "pools")]
    return f"| {model} | {batch} | {' | '.join(cells)} | {choosing:.2f} s, repaid after {repaid * INTERVAL:.0f} steps |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; 36 replicas; {INTERVAL} steps and an evaluation against the loop")
    print("| model | batch | one model | and images folded | and own pools | choosing |\n|---|---|---|---|---|---|")
    for model, batch in CASES:
        print(measured(model, batch, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
