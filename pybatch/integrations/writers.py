"""Where figures of a run go: TensorBoard, Weights & Biases, a CSV file. Each is a `Writer`.

trajectory = pybatch.noise.Trajectory(handle, tensorboard=CSVWriter("noise.csv"))
write_run(pybatch.Run.from_json(text), TensorBoardWriter("runs/bench"))
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Protocol

from pybatch.base.errors import UsageError
from pybatch.records import Run

_COLUMNS = ("step", "tag", "value")
_OF_BATCH = ("samples_per_s", "step_ms", "memory_bytes", "mfu_measured", "joules_per_sample")
_OF_VERDICT = ("best_batch", "critical_batch", "saturation_batch", "useful_devices", "learning_rate")


class Writer(Protocol):
    """A tracker, as torch's SummaryWriter spells it."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        """One figure at a step."""


class CSVWriter:
    """A line a figure: step, tag, value. A file that is there is gone on with; every line is written at once.

    Raises:
        UsageError: it cannot be written, or is another file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", newline="") as file:
                file.seek(0)
                head = file.readline().strip()
                if not head:
                    csv.writer(file).writerow(_COLUMNS)
        except OSError as error:
            raise UsageError(f"{str(path)!r} cannot be written: {error.strerror}. Name another file.") from None
        if head not in ("", ",".join(_COLUMNS)):
            raise UsageError(f"{str(path)!r} is another CSV file: it begins with {head!r:.60}. Name a new one.")

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        """As `Writer`."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow((step, tag, f"{value:.9g}"))

    def close(self) -> None:
        """As others have it: nothing is held back."""


class TensorBoardWriter:
    """TensorBoard's event file in a folder.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("TensorBoard", "tensorboard", error) from None
        self._writer: Any = SummaryWriter(str(folder))

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        """As `Writer`."""
        self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases: one that is open, or a new one.

    Args:
        run: of `wandb.init`; None: the one that is open, else a new one with these settings.
        settings: arguments of `wandb.init`, such as project="mine".

    Raises:
        UsageError: wandb is not installed.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        if run is None:
            try:
                import wandb
            except ImportError as error:
                raise _missing("Weights & Biases", "wandb", error) from None
            run = (None if settings else wandb.run) or wandb.init(**settings)
        self.run = run

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        """As `Writer`."""
        self.run.log({tag: value}, step=step)

    def close(self) -> None:
        """End the run."""
        self.run.finish()


def write_run(run: Run, writer: Writer) -> None:
    """The figures of a record: of a batch size at it as the step, of a trajectory at its steps, of the verdict at 0."""
    for point in run.capacity.batches if run.capacity is not None else ():
        for name in _OF_BATCH:
            _write(writer, f"capacity/{name}", getattr(point, name), point.batch)
    if run.noise is not None:
        for name in ("b_simple", "low", "high"):
            _write(writer, f"noise/{name}", getattr(run.noise, name), run.noise.warmup_steps or 0)
    for at in run.trajectory.points if run.trajectory is not None else ():
        for name in ("b_simple", "low", "high", "loss"):
            _write(writer, f"trajectory/{name}", getattr(at, name), at.last_step)
    for name in _OF_VERDICT if run.verdict is not None else ():
        _write(writer, f"verdict/{name}", getattr(run.verdict, name), 0)


def _write(writer: Writer, tag: str, value: float | None, step: int) -> None:
    if value is not None and math.isfinite(value):
        writer.add_scalar(tag, float(value), int(step))


def _missing(what: str, package: str, error: ImportError) -> UsageError:
    return UsageError(f"{what} can't be imported ({error}). Install it with 'pip install {package}', or use CSVWriter.")
