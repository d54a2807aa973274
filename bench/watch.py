"""Cost of `pybatch watch` in a training's step, by what its noise comes from.

    python bench/watch.py [--steps N] [--only NAME ...] [--output FILE]

A training on one thread is watched, its record written as it grows. Told is, as shares of the time of a plain step,

    each    what every step pays for hooks: of a training of the same layers, loop and noise source, but small, the
            least of its steps between two measured ones over the least of those before and after, of several watches;
    rest    what some steps pay, for a row of the noise scale, a line on the screen or the record: all their time (and
            that of the step before and after, as memory is asked for anew) beyond that of as many untouched steps.

Both by the processor time of the process, the rest with its 95 % interval from resampling whole periods from row to
row. They are put together as such, since a shared machine shows the whole no better: two unwatched trainings alike
differ by up to a tenth, by where their memory lies. A run's first steps, in which the cost of the noise scale is tried
out, are told apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
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

    model: Callable[[int], nn.Module]  # of a width
    shape: Callable[[int], tuple[int, ...]]  # of a batch
    width: int
    micro_batches: int = 1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


class Recurrent(nn.Module):
    """Layers whose examples can't be told apart inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(width // 2, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(x)[0][:, -1])
        return found


def mlp(width: int) -> nn.Module:
    layers = (nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))
    return nn.Sequential(*layers)


def cnn(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((3, width), (width, 2 * width), (2 * width, 2 * width))):
        layers += [nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


SMALL = 4  # width, where a step's own time is next to nothing
CASES = {
    "null": Case(mlp, lambda width: (64, width), 1024),
    "per-example": Case(mlp, lambda width: (64, width), 1024),
    "micro-batches": Case(mlp, lambda width: (32, width), 1024, 2),
    # Batch normalization has no gradient of one example.
    "adam-moments": Case(cnn, lambda width: (16, 3, width, width), 32),
    "halves": Case(Recurrent, lambda width: (64, width // 4, width // 2), 128, optimizer=torch.optim.SGD),
}


class Training:
    """A loop as scripts have it."""

    def __init__(self, case: Case, width: int) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.model(width)
        self.optimizer = case.optimizer(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(*case.shape(width))
        self.y = torch.randint(10, (len(self.x),))

    def step(self) -> float:
        """Its processor seconds."""
        began = time.process_time()
        self.optimizer.zero_grad()
        for _ in range(self.case.micro_batches):
            loss = nn.functional.cross_entropy(self.model(self.x), self.y) / self.case.micro_batches
            loss.backward()
        self.optimizer.step()
        return time.process_time() - began


class Watched:
    """A watch of what is done in its context, whose noise must come from the named source."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder / "run.json.partial"
        self.touched = False  # whether the step under way had more to do than others: a row, a line or the record
        self.watching = Watching(WatchOptions(time_budget=1.0), on_partial=self._kept)
        self.stack = ExitStack()

    def _kept(self, run: Run) -> None:
        self.path.write_text(run.to_json())

    def _seen(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            self.touched = True
            return call(*args)

        return seen

    def __enter__(self) -> Watched:
        for where, name in ((Collector, "_row"), (self.watching, "_save"), (self.watching, "_tell")):
            self.stack.enter_context(mock.patch.object(where, name, self._seen(getattr(where, name))))
        self.watching.start()
        return self

    def __exit__(self, *raised: object) -> None:
        run = self.watching.finish(measure=False)
        self.stack.close()
        assert self.watching.fault is None, self.watching.fault
        assert run is not None
        assert run.noise is not None, run.notes
        assert run.noise.source == self.name, run.noise.source


Interval = tuple[float, float, float]  # a figure, and 95 % of it


def near(touched: np.ndarray) -> np.ndarray:
    """Touched steps, and those before and after them."""
    found = touched.copy()
    found[:-1] |= touched[1:]
    found[1:] |= touched[:-1]
    return found


def rest(seconds: np.ndarray, touched: np.ndarray) -> Interval:
    """The share of time that touched steps and their neighbours take beyond others."""
    slow, periods = near(touched), np.split(np.arange(len(seconds)), np.flatnonzero(touched)[1:])
    if len(periods) < 10 or slow.mean() > 0.5:
        raise SystemExit(f"{len(periods)} rows in {len(seconds)} steps: give --steps for at least 10, 5 steps apart")
    sums = np.array(
        [(seconds[p][slow[p]].sum(), slow[p].sum(), seconds[p][~slow[p]].sum(), (~slow[p]).sum()) for p in periods]
    )
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(4000, len(sums)))].sum(axis=1)
    found = []
    for taken, slows, others, plains in (sums.sum(axis=0), *drawn):
        plain = others / plains
        found.append((taken - slows * plain) / (plain * (slows + plains)))
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return float(found[0]), float(low), float(high)


def run(training: Training, watched: Watched, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Processor seconds of so many steps, and which of them were touched."""
    seconds, marks = np.zeros(steps), np.zeros(steps, bool)
    for i in range(steps):
        watched.touched = False
        seconds[i], marks[i] = training.step(), watched.touched
    return seconds, marks


def each(name: str, case: Case, folder: Path, watches: int = 8, steps: int = 400) -> float:
    """Seconds that every step pays for hooks: the least of runs of steps between two measured ones, over the least of
    plain ones before and after. A slow spell of the machine is in neither."""
    training = Training(case, SMALL)
    plain, hooked = [least(np.array([training.step() for _ in range(steps)]))], []
    for _ in range(watches):
        with Watched(name, folder) as watched:
            run(training, watched, TRIED)
            seconds, touched = run(training, watched, steps)
        hooked.append(least(seconds, near(touched)))
        plain.append(least(np.array([training.step() for _ in range(steps)])))
    return float(min(hooked) - min(plain))


def least(seconds: np.ndarray, left_out: np.ndarray | None = None, together: int = 5) -> float:
    """The least mean of so many steps in a row, none of which is left out."""
    row = np.ones(together) / together
    means = np.convolve(seconds, row, mode="valid")
    if left_out is not None:
        means = means[np.convolve(left_out, row, mode="valid") == 0]
    return float(means.min())


def measure(name: str, case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """The cost of one case."""
    training = Training(case, case.width)
    plain = sum(training.step() for _ in range(TRIED)) / TRIED
    if name == "null":
        seconds = np.array([training.step() for _ in range(steps)])
        marks = np.arange(steps) % EVERY == EVERY - 1
        return {"step_ms": 1e3 * float(np.median(seconds)), "rest": rest(seconds, marks), "steps": steps}
    with Watched(name, folder) as watched:
        tried = run(training, watched, TRIED)[0].mean()
        seconds, marks = run(training, watched, steps)
    step = float(seconds[~near(marks)].mean())
    hooks, of = each(name, case, folder), rest(seconds, marks)
    return {
        "step_ms": 1e3 * step,
        "each_us": 1e6 * hooks,
        "rest": of,
        "all": tuple(hooks / step + share for share in of),
        "touched": int(marks.sum()),
        "steps": steps,
        "first_steps": tried / plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", nargs="*", choices=tuple(CASES), default=[*CASES])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            of = found[name] = measure(name, CASES[name], given.steps, Path(folder))
            shown = {part: [f"{100 * share:.2f}" for share in of[part]] for part in ("rest", "all") if part in of}
            parts = "; ".join(f"{part} {m} % [{low}, {high}]" for part, (m, low, high) in shown.items())
            print(f"{name:14} {of['step_ms']:.1f} ms a step: each {of.get('each_us', 0.0):.0f} us; {parts}", flush=True)
    if given.output is not None:
        record = {"device": describe(torch.device("cpu")).name, "torch": torch.__version__, "cases": found}
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
