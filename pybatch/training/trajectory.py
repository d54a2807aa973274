"""The losses of one training run, and the step at which a target was reached. No torch here.

Losses are those of whole, fixed batches of both splits, so that nothing of the drawing of batches is in them. They are
taken at every step first, then at a spacing of a sixteenth of the steps made: a share, so that every crossing is known
equally well; and at the cap of a trial that is given up there. Smoothing is a mean over the last fifth of the steps:
its delay is a share of the steps too, the same for every batch size, and so falls out of a critical batch.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pybatch.base.errors import UsageError

Losses = NDArray[np.float32]
Steps = NDArray[np.int32]

SPACING = 16  # evaluations while the step number grows by a factor e; a crossing is known within 6 % before smoothing
WINDOW = 0.2  # of the steps made: past it, single evaluations no longer decide when a target was met
_MOST_BYTES = 1 << 20  # of a column: evaluations grow with the logarithm of the steps
Split = str  # "train" and "test": their losses; "test:accuracy": a metric of one of them
SPLITS = ("train", "test")
SMOOTHING = (
    "losses of fixed batches of both splits, at every step first, then "
    f"{SPACING} times while the steps grow by a factor e; averaged over the last {WINDOW:.0%} of the steps"
)


def split_of(target: str) -> str:
    """The split that a target is of: "test" of "test:accuracy"."""
    return target.partition(":")[0]


def metric_of(target: str) -> str | None:
    """The metric that a target names; None of a loss."""
    return target.partition(":")[2] or None


def ordered(targets: Iterable[str]) -> list[str]:
    """Targets in the order of records: losses first, the training's before the test's; then metrics by name."""
    return sorted(targets, key=lambda t: (metric_of(t) is not None, SPLITS.index(split_of(t)), t))


@dataclass(frozen=True)
class Metric:
    """A metric's values at every evaluation, and which way it goes."""

    values: Losses
    higher: bool  # is better


def next_evaluation(step: int) -> int:
    """The step of the evaluation after the one at `step`."""
    return step + max(1, step // SPACING)


@dataclass(frozen=True)
class Crossing:
    """When a target was reached: the first step at or below it lies in (before, at]; `steps` is its estimate."""

    steps: float
    before: int
    at: int


@dataclass(frozen=True)
class Trajectory:
    """Losses [n] of both splits at the steps [n], ascending from 0; NaN or infinite where training broke down."""

    steps: Steps
    train: Losses
    test: Losses
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # "test:accuracy"; those that a target named
    # A search asks for the same ones again and again.
    _crossings: dict[tuple[str, float], Crossing | None] = field(default_factory=dict, init=False, repr=False)

    def loss(self, split: str) -> Losses:
        """The losses of one split, or a metric's values, unsmoothed."""
        if split in self.metrics:
            return self.metrics[split].values
        if split not in SPLITS:
            raise UsageError(f"the runs kept no {split}: it was no target of theirs. Sweep with it as a target.")
        return self.train if split == "train" else self.test

    def has(self, split: str) -> bool:
        """Whether this was evaluated."""
        return split in SPLITS or split in self.metrics

    def sign(self, split: str) -> float:
        """-1 where higher is better, else 1: times this, lower is."""
        return -1.0 if split in self.metrics and self.metrics[split].higher else 1.0

    def crossing(self, split: str, target: float, limit: float = math.inf) -> Crossing | None:
        """The first crossing of the smoothed loss up to step `limit`, or None."""
        if (split, target) not in self._crossings:
            losses, goal = self.sign(split) * self.loss(split), signed(target, self.sign(split))
            each = (crossing_at(self.steps, losses, i, goal) for i in _near(self.steps, losses, goal))
            self._crossings[split, target] = next((found for found in each if found is not None), None)
        first = self._crossings[split, target]
        return first if first is not None and first.steps <= limit else None

    def compressed(self) -> tuple[bytes, bytes, bytes]:
        """Steps (int32), train and test losses (float32), little-endian, each compressed by zlib."""
        arrays = (self.steps.astype("<i4"), self.train.astype("<f4"), self.test.astype("<f4"))
        steps, train, test = (zlib.compress(a.tobytes(), 6) for a in arrays)
        return steps, train, test

    def compressed_metrics(self) -> bytes:
        """The metrics as JSON, compressed by zlib."""
        plain = {
            name: {"higher": m.higher, "values": [float(v) if math.isfinite(v) else None for v in m.values]}
            for name, m in self.metrics.items()
        }
        return zlib.compress(json.dumps(plain).encode(), 6)

    @staticmethod
    def decompressed(steps: bytes, train: bytes, test: bytes, metrics: bytes | None = None) -> Trajectory:
        """What `compressed` gave; raises UsageError where the bytes are not that."""
        try:
            found = Trajectory(
                np.frombuffer(_inflated(steps), "<i4").astype(np.int32),
                np.frombuffer(_inflated(train), "<f4").astype(np.float32),
                np.frombuffer(_inflated(test), "<f4").astype(np.float32),
                _metrics(_inflated(metrics)) if metrics is not None else {},
            )
        except (zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"a stored trajectory cannot be read ({error}): the store is damaged.") from None
        columns = [found.train, found.test, *(metric.values for metric in found.metrics.values())]
        if any(len(found.steps) != len(column) for column in columns):
            raise UsageError("a stored trajectory has columns of different length: the store is damaged.")
        if not len(found.steps) or found.steps[0] != 0 or np.any(np.diff(found.steps) <= 0):
            raise UsageError("a stored trajectory has steps that do not ascend from 0: the store is damaged.")
        return found


def signed(target: float, sign: float) -> float:
    """A target where lower is better; one of minus infinity is never reached, whichever way its figure goes."""
    return sign * target if target != -math.inf else target


def _metrics(text: bytes) -> dict[str, Metric]:
    found = {}
    for name, each in json.loads(text).items():
        values = np.array([math.nan if v is None else v for v in each["values"]], dtype=np.float32)
        if metric_of(name) is None or split_of(name) not in SPLITS or not isinstance(each["higher"], bool):
            raise ValueError(f"{name!r} is no metric of a split")
        found[name] = Metric(values, each["higher"])
    return found


def _inflated(column: bytes) -> bytes:
    """A column unpacked; ValueError where that is more than a training run has, as of what was made to fill memory."""
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(column, _MOST_BYTES)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"a column holds over {_MOST_BYTES} bytes, or is cut")
    return found


def smoothed(steps: Steps, losses: NDArray[np.floating], i: int) -> NDArray[np.float64]:
    """The mean over the evaluations of the last WINDOW of the steps up to the i-th: losses [n, ...] -> [...]."""
    first = int(np.searchsorted(steps[: i + 1], (1 - WINDOW) * steps[i], side="right")) if steps[i] else i
    mean: NDArray[np.float64] = np.mean(losses[min(first, i) : i + 1], axis=0, dtype=np.float64)
    return mean


def loss_at(found: Trajectory, split: str, step: float) -> float | None:
    """The smoothed loss of a split at a step, interpolated; None where training had ended or broken down before."""
    i = int(np.searchsorted(found.steps, step))
    if i == len(found.steps):
        return None
    now, at = float(smoothed(found.steps, found.loss(split), i)), int(found.steps[i])
    if step < at:
        last, before = float(smoothed(found.steps, found.loss(split), i - 1)), int(found.steps[i - 1])
        now = last + (now - last) * (step - before) / (at - before)
    return now if math.isfinite(now) else None


def lowest(found: Trajectory, split: str) -> tuple[float, int]:
    """The lowest smoothed loss of a run and the step at which it was taken; infinite where none is finite.

    Of a metric of which higher is better, minus the highest.
    """
    losses = found.sign(split) * found.loss(split)
    mean, error = _means(found.steps, losses)
    near = np.flatnonzero(np.isfinite(mean) & (mean <= np.min(mean, initial=math.inf) + 2 * error))
    values = [(float(smoothed(found.steps, losses, i)), int(found.steps[i])) for i in near.tolist()]
    return min(values, default=(math.inf, 0))


def _means(steps: Steps, losses: Losses) -> tuple[NDArray[np.float64], float]:
    """Smoothed losses of all evaluations at once, where one by one is slow, and how far rounding takes them off.

    Infinite where one in the window is not finite.
    """
    finite = np.isfinite(losses)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0), dtype=np.float64)])
    broken = np.concatenate([[0], np.cumsum(~finite)])
    ends = np.arange(len(steps))
    first = np.minimum(np.searchsorted(steps, (1 - WINDOW) * steps, side="right"), ends)
    first[steps == 0] = ends[steps == 0]
    mean = (total[ends + 1] - total[first]) / (ends + 1 - first)
    return np.where(broken[ends + 1] == broken[first], mean, math.inf), 1e-12 * (1 + float(np.max(np.abs(total))))


def _near(steps: Steps, losses: Losses, target: float) -> Iterator[int]:
    """Evaluations whose smoothed loss is at or below the target, to rounding."""
    mean, error = _means(steps, losses)
    return iter(np.flatnonzero(mean <= target + error).tolist())


def crossing_at(steps: Steps, losses: NDArray[np.floating], i: int, target: float) -> Crossing | None:
    """The crossing between evaluations i - 1 and i of one run, interpolated and rounded up to a whole step."""
    now = float(smoothed(steps, losses, i))
    if not now <= target:
        return None
    if i == 0:
        return Crossing(0.0, 0, 0)
    last, before, at = float(smoothed(steps, losses, i - 1)), int(steps[i - 1]), int(steps[i])
    share = (last - target) / (last - now) if math.isfinite(last) and last > now else 1.0
    return Crossing(float(min(at, max(before + 1, math.ceil(before + share * (at - before))))), before, at)
