"""Cost of `pybatch watch` in a training's step, by what its noise comes from, against the same training unwatched.

    python bench/watch.py [--blocks N] [--steps N] [--only NAME ...] [--output FILE]

Two trainings of one model on one thread, of which one (A) is watched, with its record written as it grows: so many
steps of each follow each other as A B B A and B A A B in turns. Given are the ratio of the sums over all blocks, since
what comes every so many steps counts as well, and its 95 % interval from resampling blocks, of the wall clock and of
the processor time of the process, which neighbours enter by the caches alone. "null" times an unwatched training
against another: what its interval spans can't be told from nothing. A run's first steps, in which the cost of the noise
scale is tried out, are not in it: they are told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pybatch.device.identity import describe
from pybatch.jobs.options import WatchOptions
from pybatch.jobs.watch import Watching
from pybatch.records import Run

TRIED = 120  # steps before timing begins


class Case(NamedTuple):
    """A training whose step takes over 20 ms on one core of 2026."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch
    micro_batches: int = 1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


class Recurrent(nn.Module):
    """Layers whose examples can't be told apart inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(x)[0][:, -1])
        return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((3, 32), (32, 64), (64, 64))):
        layers += [nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


CASES = {
    "null": Case(mlp, (64, 1024)),
    "per-example": Case(mlp, (64, 1024)),
    "micro-batches": Case(mlp, (32, 1024), 2),
    "adam-moments": Case(cnn, (16, 3, 32, 32)),  # batch normalization has no gradient of one example
    "halves": Case(Recurrent, (64, 32, 64), optimizer=torch.optim.SGD),
}


class Training:
    """One of the twins."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.model()
        self.optimizer = case.optimizer(self.model.parameters(), lr=1e-4)
        self.x, self.y = torch.randn(*case.shape), torch.randint(10, (case.shape[0],))

    def run(self, steps: int) -> tuple[float, float]:
        """Wall and processor seconds of so many steps."""
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(self.case.micro_batches):
                loss = nn.functional.cross_entropy(self.model(self.x), self.y) / self.case.micro_batches
                loss.backward()
            self.optimizer.step()
        return time.perf_counter() - wall, time.process_time() - processor


Pairs = list[tuple[float, float]]  # seconds of the first twin and of the second, block by block


def interval(watched: Pairs, before: Pairs) -> tuple[float, float, float]:
    """The twins' ratio while one is watched over that before, with its 95 % interval.

    Two trainings alike differ by up to a tenth on their own, by where their memory lies.
    """
    rng, logs, means = np.random.default_rng(0), [], []
    for spent in (watched, before):
        pairs = np.array(spent)
        drawn = pairs[rng.integers(len(pairs), size=(4000, len(pairs)))].sum(axis=1)
        logs.append(np.log(drawn[:, 0] / drawn[:, 1]))
        first, second = pairs.sum(axis=0)
        means.append(float(np.log(first / second)))
    low, high = np.quantile(logs[0] - logs[1], [0.025, 0.975])
    return float(np.exp(means[0] - means[1])), float(np.exp(low)), float(np.exp(high))


def turns(first: Training, second: Training, blocks: int, steps: int) -> tuple[Pairs, Pairs]:
    """Wall and processor seconds of both twins, A B B A and B A A B in turn."""
    wall: Pairs = []
    processor: Pairs = []
    for block in range(blocks):
        spent = {True: np.zeros(2), False: np.zeros(2)}
        for whose in (True, False, False, True) if block % 2 else (False, True, True, False):
            spent[whose] += (first if whose else second).run(steps)
        for of, one, other in zip((wall, processor), spent[True].tolist(), spent[False].tolist(), strict=True):
            of.append((one, other))
    return wall, processor


def measure(name: str, case: Case, blocks: int, steps: int, folder: Path) -> dict[str, object]:
    """The cost of one case."""
    first, second = Training(case), Training(case)
    for twin in (first, second):
        twin.run(TRIED // 4)
    before = turns(first, second, blocks, steps)
    watching = None
    if name != "null":
        path = folder / "run.json.partial"

        def kept(run: Run) -> None:
            path.write_text(run.to_json())

        watching = Watching(WatchOptions(time_budget=1.0), on_partial=kept)
        watching.start()
    tried, plain = first.run(TRIED)[1], second.run(TRIED)[1]
    after = turns(first, second, blocks, steps)
    found: dict[str, object] = {
        "step_ms": 1e3 * statistics.median(other for _, other in after[0]) / (2 * steps),
        "wall": interval(after[0], before[0]),
        "processor": interval(after[1], before[1]),
        "first_steps_processor": tried / plain if watching is not None else None,
    }
    if watching is not None:
        run = watching.finish(measure=False)
        assert watching.fault is None, watching.fault
        assert run is not None
        assert run.noise is not None, run.notes
        assert run.noise.source == name, run.noise.source
        found |= {"pairs": run.noise.steps, "steps": run.training.steps if run.training else None}
    return found


def hooks(chunks: int = 30, steps: int = 100) -> dict[str, object]:
    """Processor microseconds that the hooks take a step, noise aside: of a model whose own takes next to nothing."""
    twins, best = [], []
    for watched in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(8, 2)
        twins.append((model, torch.optim.SGD(model.parameters(), lr=0.01)))
        watching = Watching(WatchOptions())
        if watched:
            watching.start()
        tiny(*twins[-1], 20)
        if watched and watching._observer.noise is not None:
            watching._observer.noise.detach()
            watching._observer.noise = None
    for model, optimizer in twins:
        best.append(min(tiny(model, optimizer, steps) for _ in range(chunks)))
    return {"watched_us": 1e6 * best[0], "plain_us": 1e6 * best[1], "hooks_us": 1e6 * (best[0] - best[1])}


def tiny(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Processor seconds of a step."""
    x, began = torch.zeros(4, 8), time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    return (time.process_time() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8, help="of a training in each of a block's four turns")
    parser.add_argument("--only", nargs="*", choices=("hooks", *CASES), default=["hooks", *CASES])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "hooks" in given.only:
            found["hooks"] = hooks()
            print(f"hooks          {found['hooks']}", flush=True)
        for name in [name for name in given.only if name in CASES]:
            found[name] = measure(name, CASES[name], given.blocks, given.steps, Path(folder))
            of = found[name]
            times = ", ".join(
                f"{clock} {m:.3f} [{low:.3f}, {high:.3f}]"
                for clock in ("wall", "processor")
                for m, low, high in [of[clock]]  # type: ignore[misc]
            )
            print(f"{name:14} step {of['step_ms']:.1f} ms, watched over plain: {times}; {of}", flush=True)
    if given.output is not None:
        record = {"device": describe(torch.device("cpu")).name, "torch": torch.__version__, "cases": found}
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
