"""Cost of `pybatch watch` in a training's step, by what its noise comes from.

    python bench/watch.py [--steps N] [--only NAME ...] [--output FILE]

A training on one thread is watched, its record written as it grows. Told is, as shares of the time of a plain step,

    hooks   what every step pays: from a model whose own step takes next to nothing, watched and not;
    rest    what some steps pay, for a row of the noise scale, a line on the screen or the record: all their time (and
            that of the step before and after, as memory is asked for anew) beyond that of as many untouched steps.

Both by the processor time of the process, which neighbours enter by the caches alone, with 95 % intervals from
resampling: of whole periods from row to row for the rest. That they add up to what the watch costs can be shown no
better on a shared machine: two unwatched trainings alike differ by up to a tenth, by where their memory lies. A run's
first steps, in which the cost of the noise scale is tried out, are told apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import nn

from pybatch.device.identity import describe
from pybatch.jobs.options import WatchOptions
from pybatch.jobs.watch import Watching
from pybatch.noise.handle import Collector
from pybatch.records import Run

TRIED = 120  # steps before timing begins
EVERY = 30  # steps from one to the next that is taken for a touched one where none is


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
    """A loop as scripts have it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.model()
        self.optimizer = case.optimizer(self.model.parameters(), lr=1e-4)
        self.x, self.y = torch.randn(*case.shape), torch.randint(10, (case.shape[0],))

    def step(self) -> float:
        """Its processor seconds."""
        began = time.process_time()
        self.optimizer.zero_grad()
        for _ in range(self.case.micro_batches):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y) / self.case.micro_batches
            loss.backward()
        self.optimizer.step()
        return time.process_time() - began


class Touched:
    """Whether the step under way had more to do than others: a row, a line or the record."""

    def __init__(self) -> None:
        self.now = False

    @contextmanager
    def watches(self, watching: Watching) -> Iterator[None]:
        with ExitStack() as stack:
            for where, name in ((Collector, "_row"), (watching, "_save"), (watching, "_tell")):
                stack.enter_context(mock.patch.object(where, name, self._seen(getattr(where, name))))
            yield

    def _seen(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            self.now = True
            return call(*args)

        return seen


def rest(seconds: np.ndarray, touched: np.ndarray) -> tuple[float, float, float]:
    """The share of time that touched steps and their neighbours take beyond others, with its 95 % interval."""
    near = touched.copy()
    near[:-1] |= touched[1:]
    near[1:] |= touched[:-1]
    periods = np.split(np.arange(len(seconds)), np.flatnonzero(touched)[1:])
    sums = np.array(
        [(seconds[p][near[p]].sum(), near[p].sum(), seconds[p][~near[p]].sum(), (~near[p]).sum()) for p in periods]
    )
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(4000, len(sums)))].sum(axis=1)
    found = []
    for slow, slows, plain, plains in (sums.sum(axis=0), *drawn):
        found.append((slow - slows * plain / plains) / (plain / plains * (slows + plains)))
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return float(found[0]), float(low), float(high)


def measure(name: str, case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """The cost of one case."""
    training, touched, path = Training(case), Touched(), folder / "run.json.partial"
    plain = sum(training.step() for _ in range(TRIED)) / TRIED

    def kept(run: Run) -> None:
        path.write_text(run.to_json())

    watching = Watching(WatchOptions(time_budget=1.0), on_partial=kept)
    with touched.watches(watching):
        if name != "null":
            watching.start()
        tried = sum(training.step() for _ in range(TRIED)) / TRIED
        seconds, marks = np.zeros(steps), np.zeros(steps, bool)
        for i in range(steps):
            touched.now = name == "null" and i % EVERY == EVERY - 1
            seconds[i], marks[i] = training.step(), touched.now
        run = watching.finish(measure=False) if name != "null" else None
    assert watching.fault is None, watching.fault
    found = {"step_ms": 1e3 * float(np.median(seconds)), "rest": rest(seconds, marks)}
    found |= {"touched": int(marks.sum()), "steps": steps, "first_steps": tried / plain}
    if run is not None:
        assert run.noise is not None, run.notes
        assert run.noise.source == name, run.noise.source
    return found


def hooks(chunks: int = 30, steps: int = 100) -> dict[str, float]:
    """Processor microseconds that the hooks take a step, noise aside: of a model whose own takes next to nothing."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [tiny(model, optimizer, steps) for _ in range(chunks)]
    watching = Watching(WatchOptions())
    watching.start()
    tiny(model, optimizer, 20)
    noise = watching._observer.noise
    assert noise is not None
    noise.detach()
    watching._observer.noise = None
    watched = [tiny(model, optimizer, steps) for _ in range(chunks)]
    assert watching._observer.steps is not None
    assert watching._observer.steps.count >= chunks * steps
    watching.finish(measure=False)
    plain = min(*before, *(tiny(model, optimizer, steps) for _ in range(chunks)))
    return {"watched_us": 1e6 * min(watched), "plain_us": 1e6 * plain, "hooks_us": 1e6 * (min(watched) - plain)}


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
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", nargs="*", choices=tuple(CASES), default=[*CASES])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    paid = hooks()
    print(f"hooks: {paid}", flush=True)
    found: dict[str, dict[str, Any]] = {"hooks": paid}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            of = found[name] = measure(name, CASES[name], given.steps, Path(folder))
            of["hooks"] = 0.0 if name == "null" else paid["hooks_us"] / (1e3 * of["step_ms"])
            middle, low, high = (100 * (share + of["hooks"]) for share in of["rest"])
            print(
                f"{name:14} {of['step_ms']:.1f} ms a step: + {middle:.2f} % [{low:.2f}, {high:.2f}]; {of}", flush=True
            )
    if given.output is not None:
        record = {"device": describe(torch.device("cpu")).name, "torch": torch.__version__, "cases": found}
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
