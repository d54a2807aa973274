"""The noise scale against steps along a training run: constant memory, JSONL and TensorBoard. No torch here.

The noise scale grows as the loss falls (McCandlish et al. 2018, section 2.2), so one number for a whole run hides
what matters. A handle or optimizer keeps the sums of all steps; their differences are those of each stretch of steps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pybatch.base.codec import parse
from pybatch.base.errors import UsageError
from pybatch.base.plain import said
from pybatch.fits.noise import MIN_BLOCKS, judge
from pybatch.records import NoisePoint, NoiseScale, NoiseTrajectory, Note

ROWS = 512  # stretches kept before adjacent ones are merged: 28 KB
PER_POINT = 16  # stretches one point and its interval rest on: twice the least
EVERY = 10  # steps between readings of a longer run
SCHEMA = "pybatch-noise/1"

_COLUMNS = ("first_step", "last_step", "pairs", "grad_sq", "trace", "loss", "losses")  # sums, from the third on
_COUNTED = ("first_step", "last_step", "pairs", "losses")  # which are whole, and always known
_LARGEST = 1e150  # of a figure: sums of squares stay within floats
_TAGS = ("b_simple", "low", "high", "grad_sq", "trace")


class Measured(Protocol):
    """A handle of `attach`, or a fused optimizer made with noise=True."""

    @property
    def noise(self) -> NoiseScale:
        """The noise scale; the parts of its `trajectory`, or itself where it has none, add up to all steps so far."""


class Scalars(Protocol):
    """TensorBoard's SummaryWriter, or what has its `add_scalar`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Keep a value."""


class Trajectory:
    """Records the noise scale along a run; `record` is what a report draws.

    Args:
        source: what measures: a handle of `attach`, or a fused optimizer made with noise=True.
        path: JSONL file, one line per reading, each written at once. A file of an earlier run is gone on with: its
            lines are read back, a torn last line is cut off. It grows with the run; memory does not.
        tensorboard: a directory, or a SummaryWriter of your own; written under "noise/".
        every: steps between readings, each of which waits for the device. None: each step at first, so that there is an
            early point, and in stages fewer until it is every tenth.

    A step that is not above the last one (a run resumed from an older checkpoint) replaces what was recorded since.

    Raises:
        UsageError: an argument out of range, a file that is not such a trajectory, or TensorBoard is not installed.
    """

    def __init__(
        self,
        source: Measured,
        path: str | Path | None = None,
        *,
        tensorboard: str | Path | Scalars | None = None,
        every: int | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"every {every}: give the steps between readings, 1 or more.")
        self._source, self._every = source, every
        self._rows: NDArray[np.float64] = np.zeros((0, len(_COLUMNS)))
        self._per_row, self._in_last = 1, 0  # readings a row holds when full; readings in the last one
        self._loss: Any = 0.0
        self._losses = 0
        self._name = ""
        self._unit: str | None = None
        self._seen = self._cumulative()
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._open(self._path)
        self._writer = _writer(tensorboard)

    def update(self, step: int, loss: Any = None) -> NoisePoint | None:
        """Call after each optimizer step; reads the noise scale every so many steps.

        Args:
            step: of the training run.
            loss: its training loss, a number or a tensor; a tensor is looked at when the noise is read.

        Returns:
            The latest point where it was read, else None.
        """
        if loss is not None:
            self._loss = self._loss + (loss.detach() if hasattr(loss, "detach") else loss)
            self._losses += 1
        last = self._last_step
        if step <= last:
            self._forget_from(step)
        elif len(self._rows) and step - last < self._gap:
            return None
        now = self._cumulative()
        pairs, grad_sq, trace = (a - b for a, b in zip(now, self._seen, strict=True))
        if pairs < 0:  # the source was set back to an earlier state
            pairs = grad_sq = trace = 0.0
        first = self._last_step + 1 if len(self._rows) else step
        row = np.array([first, step, pairs, grad_sq, trace, float(self._loss), self._losses])
        self._seen, self._loss, self._losses = now, 0.0, 0
        self._add(row)
        point = self._point(self._rows[-PER_POINT:])
        if self._path is not None:
            self._write(self._path, row, point)
        if self._writer is not None:
            for tag in _TAGS:
                value = getattr(point, tag)
                if value is not None:
                    self._writer.add_scalar(f"noise/{tag}", value, step)
        return point

    @property
    def record(self) -> NoiseTrajectory:
        """Points in order of steps, each over at least 8 stretches where there are as many."""
        count = max(1, len(self._rows) // PER_POINT)
        parts = np.array_split(self._rows, count) if len(self._rows) else []
        notes: tuple[Note, ...] = ()
        if self._per_row > 1:
            notes = (Note("trajectory.points", f"{self._per_row} readings were merged into each stretch as it grew"),)
        return NoiseTrajectory(tuple(self._point(part) for part in parts), self._name, self._unit, notes)

    # Inside.

    @property
    def _last_step(self) -> float:
        return float(self._rows[-1, 1]) if len(self._rows) else -math.inf

    @property
    def _gap(self) -> int:
        """Steps to the next reading."""
        readings = (len(self._rows) - 1) * self._per_row + self._in_last
        return min(EVERY, 1 + readings // MIN_BLOCKS) if self._every is None else self._every

    def _cumulative(self) -> tuple[float, float, float]:
        found = self._source.noise
        self._name, self._unit = found.source, found.unit
        sums = [
            (float(part.steps), part.grad_sq * part.steps, part.trace * part.steps)
            for part in found.trajectory or (found,)
            if part.grad_sq is not None and part.trace is not None
        ]
        return math.fsum(s[0] for s in sums), math.fsum(s[1] for s in sums), math.fsum(s[2] for s in sums)

    def _add(self, row: NDArray[np.float64]) -> None:
        if self._in_last == self._per_row or not len(self._rows):
            if len(self._rows) == ROWS:
                self._rows = _merge(self._rows[0::2], self._rows[1::2])
                self._per_row *= 2
            self._rows = np.vstack([self._rows, row])
            self._in_last = 1
        else:
            self._rows[-1] = _merge(self._rows[-1], row)
            self._in_last += 1

    def _forget_from(self, step: int) -> None:
        self._rows = self._rows[self._rows[:, 1] < step]
        self._in_last = self._per_row

    @staticmethod
    def _point(rows: NDArray[np.float64]) -> NoisePoint:
        found = judge(rows[:, 2:5], missing="no pair of norms in these steps")
        why = found.why
        if found.pairs and len(rows) < MIN_BLOCKS:
            why = f"{len(rows)} readings so far are too few for an interval; {MIN_BLOCKS} are the least"
        loss, losses = rows[:, 5:].sum(axis=0)
        return NoisePoint(
            first_step=int(rows[0, 0]),
            last_step=int(rows[-1, 1]),
            b_simple=found.value,
            low=found.low,
            high=found.high,
            grad_sq=found.grad_sq,
            trace=found.trace,
            status=found.status,
            steps=found.pairs,
            loss=float(loss / losses) if losses and math.isfinite(loss) else None,
            reason=why,
        )

    # The file.

    def _open(self, path: Path) -> None:
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"schema": SCHEMA, "source": self._name, "unit": self._unit}) + "\n")
            return
        _, rows, length = _read(path)
        if length < path.stat().st_size:  # the run was stopped while it wrote
            with path.open("r+b") as file:
                file.truncate(length)
        self._take(rows)

    def _take(self, rows: list[list[float]]) -> None:
        for row in rows:
            if row[1] <= self._last_step:
                self._forget_from(int(row[1]))
            self._add(np.array(row))

    def _write(self, path: Path, row: NDArray[np.float64], point: NoisePoint) -> None:
        line: dict[str, Any] = dict(zip(_COLUMNS, (v if math.isfinite(v) else None for v in row.tolist()), strict=True))
        line |= {name: getattr(point, name) for name in ("b_simple", "low", "high", "status")}
        line |= {"source": self._name, "unit": self._unit}  # an ordinary loop's is known after its first steps alone
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_trajectory(path: Path) -> NoiseTrajectory:
    """What a `Trajectory` has written so far; the file is left as it is, also where a run is writing it.

    Raises:
        UsageError: the file can't be read, or is no noise trajectory.
    """
    try:
        head, rows, _ = _read(path)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    saved = Trajectory(_Saved())
    saved._name, saved._unit = str(head.get("source", "")), head.get("unit")
    saved._take(rows)
    return saved.record


class _Saved:
    """Stands for the source of a trajectory that is only read."""

    noise = NoiseScale(None, None, None, None, None, "unresolved", "", 0)


def _read(path: Path) -> tuple[dict[str, Any], list[list[float]], int]:
    """Head and rows of a file, and the bytes of its whole lines."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        head, *lines = [parse(line) for line in whole.decode().splitlines()]
        if head["schema"] != SCHEMA:
            raise ValueError(f"schema {head['schema']!r}")
        rows = [[_figure(c, line[c]) for c in _COLUMNS] for line in lines]
        head |= {key: line[key] for line in lines[-1:] for key in ("source", "unit") if key in line}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a noise trajectory ({type(error).__name__}: {error}). Give another path."
        ) from None
    return head, rows, len(whole)


def _figure(name: str, value: Any) -> float:
    """A figure of a row, nan where it was not measured; raises ValueError or TypeError where it is none."""
    if value is None and name not in _COUNTED:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {said(value)}: it must be a number")
    low, high = (0.0, 2.0**53) if name in _COUNTED else (-_LARGEST, _LARGEST)
    if not low <= value <= high:
        raise ValueError(f"{name} is {said(value)}: it must be a number from {low:g} to {high:g}")
    return float(value)


def _merge(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjacent rows as one."""
    return np.concatenate([one[..., :1], two[..., 1:2], one[..., 2:] + two[..., 2:]], axis=-1)


def _writer(given: str | Path | Scalars | None) -> Scalars | None:
    if not isinstance(given, str | Path):
        return given
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"tensorboard={str(given)!r}: TensorBoard can't be imported ({error}). "
            "Install it with 'pip install tensorboard', or leave the option out."
        ) from None
    writer: Scalars = SummaryWriter(str(given))
    return writer
