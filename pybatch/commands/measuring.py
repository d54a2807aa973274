"""What every measuring command does around its job: its subject, progress, delivering the record, exit status."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console

from pybatch.base import faults
from pybatch.base.errors import Interrupted, PybatchError, UsageError, carried
from pybatch.base.plain import said, visible
from pybatch.base.progress import ProgressLine
from pybatch.base.terminal import tell
from pybatch.commands.interrupting import interrupts_heard, termination_heard
from pybatch.commands.printing import ResultConsole, stdout_to_stderr
from pybatch.records import Run
from pybatch.report.formats.text import FORMATS, format_of, notes_in, print_run, render
from pybatch.report.output import Output

if TYPE_CHECKING:  # these import torch
    import torch

    from pybatch.workloads.base import Workload

DONE, BROKEN, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
BUDGET = 70.0  # seconds


LONGEST = 1e8  # seconds, three years
STEPS = 2**31 - 1  # of a training run, as stores keep them
SEEDS = 10_000
RATE = 1e6


def numbers(name: str, text: str, pattern: str, example: str) -> list[float]:
    """A list of finite numbers as typed, each of this form."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(pattern, part, re.ASCII) or not float(part) < math.inf:
            raise UsageError(f"{name} {said(text)}: {said(part)} is no such number. Write '{example}'.")
    return [float(part) for part in parts]


def check_between(name: str, value: float | None, low: float, high: float, above: bool = False) -> None:
    """Raise UsageError for a number as typed that is out of range, or none; None: not given.

    Args:
        name: of the flag, in words.
        value: as typed.
        low, high: both allowed.
        above: `low` itself is not.
    """
    if value is None or (low < value <= high if above else low <= value <= high):
        return
    least = f"above {low:g}" if above else f"from {low:g}"
    raise UsageError(f"{name} {said(value)} is out of range. Give a number {least} to {_bound(high)}.")


def _bound(value: float) -> str:
    """A bound as people write it."""
    power = value.bit_length() - 1 if isinstance(value, int) and value > 0 else 0
    return f"2^{power}" if power > 20 and value == 2**power else f"{value:g}"


def check_budget(seconds: float) -> None:
    """Raise UsageError for a time budget that is none."""
    if not 1 <= seconds <= LONGEST:
        raise UsageError(
            f"time budget {seconds:g} s is out of range. Give at least 1 second; the default is {BUDGET:g}."
        )


def check_price(price: float | None) -> None:
    """Raise UsageError for a price of a device-hour that is none."""
    check_between("price", price, 0.0, 1e6, above=True)


def typed() -> str:
    """What the user typed, for the record."""
    return visible(shlex.join(["pybatch", *sys.argv[1:]]))


@dataclass(frozen=True)
class Subject:
    """The flags that say what is measured, and where."""

    workload: str
    model: str | None
    data: str | None
    option: list[str] | None
    gpu: int | None
    cpu: bool
    size: str | None = None

    def __post_init__(self) -> None:
        if self.gpu is not None and self.cpu:
            raise UsageError("--gpu and --cpu exclude each other. Give one of them.")

    def find(self, dtype: str) -> tuple[Workload, torch.device]:
        """The workload and the device; raises UsageError where there is no such, or it has no such dtype."""
        # Torch takes seconds to import: what can be refused without it has been by now.
        import torch

        from pybatch.capacity.distributed import launched, local_rank
        from pybatch.device.identity import resolve
        from pybatch.workloads.running.finding import find
        from pybatch.workloads.running.session import checked_dtype

        checked_dtype(dtype)
        gpu = self.gpu
        if launched() and not self.cpu and gpu is None and torch.cuda.is_available():
            gpu = local_rank()
        device = resolve("cpu" if self.cpu else f"cuda:{gpu}" if gpu is not None else None)
        with stdout_to_stderr():
            options = self.option or ()
            return find(self.workload, model=self.model, data=self.data, options=options, size=self.size), device


class Delivery:
    """Where the record of a measuring command goes: known to be writable before anything is measured.

    A context manager: Ctrl-C in it ends the command, with a word on what became of the record; so does SIGTERM.
    """

    def __init__(
        self,
        format_: str | None,
        output: Path | None,
        quiet: bool,
        verbose: bool = False,
        price: float | None = None,
    ) -> None:
        check_price(price)
        self.format = checked_format(format_, output)
        self.target = Output(output) if output is not None else None
        self.quiet, self.verbose, self.price = quiet, verbose, price
        self.kept: Path | None = None  # a page or a store that has all notes, beside the output
        self.run: Run | None = None  # what was measured; None in all but one of torchrun's processes
        self.written = False
        self.fault: Exception | None = None  # of pybatch, in the middle of the measurement
        self.partial: Path | None = None  # the record that outlives this process, should it have to be ended
        self._heard = ExitStack()

    def __enter__(self) -> Self:
        # One of torchrun's processes that waits for the others would not come to hear it.
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._heard.enter_context(termination_heard())
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._heard.close()
        if self.target is not None:
            self.target.discard()
        if kind is KeyboardInterrupt:
            when = "while the result was written" if self.run else "before anything was measured; nothing was written"
            tell(visible(f"interrupted {when}"))
            raise typer.Exit(INTERRUPTED) from None

    @contextmanager
    def measuring(self, budget: float | None = None) -> Iterator[ProgressLine]:
        """Progress of the work in here, whose result becomes `run`.

        Of work that was interrupted, or broke, it is what there is so far. Calls of the workload that do not return
        are told of, and with a time budget ended.
        """
        from pybatch.capacity.distributed import local_rank
        from pybatch.workloads.running.calls import watched

        line = ProgressLine(Console(stderr=True), self.quiet or local_rank() > 0)
        try:
            with (
                stdout_to_stderr(),
                interrupts_heard(),
                line as progress,
                watched(progress.line, budget, self._give_up),
            ):
                yield progress
        except Interrupted as stop:
            self.run = stop.partial
        except PybatchError:
            raise
        except Exception as error:
            self.run, self.fault = carried(error), error
            if self.run is None:
                raise

    def _give_up(self, why: str) -> None:
        """End this process, whose main thread does not come back."""
        kept = "nothing that was measured could be kept"
        if self.partial is not None and self.partial.exists():
            kept = f"what was measured is in {self.partial}, and --resume goes on with it"
        os.write(2, visible(f"pybatch: {why}. The run ends here: {kept}.\n").encode(errors="backslashreplace"))
        os._exit(INCOMPLETE)

    def keep(self) -> int:
        """Write the run to the file that was asked for, and print nothing of it; the exit status."""
        if self.target is not None and self.run is not None:
            self.target.write(render(self.run, self.format, self.verbose))
            print(visible(f"pybatch: wrote {self.target.path}"), file=sys.stderr)
        return DONE

    def deliver(self) -> int:
        """Write and print the run; the exit status."""
        if self.run is None:  # one of torchrun's processes: the first one has the result
            return DONE
        if self.price is not None:
            self.run = replace(self.run, price=self.price)
        self.written = deliver(self.run, self.format, self.target, self.verbose, self.kept)
        if self.fault is not None:
            return faults.tell(self.fault, "; what was measured is kept")
        return DONE if self.run.complete and self.written else INCOMPLETE


def checked_format(format_: str | None, output: Path | None) -> str:
    if format_ is None:
        return format_of(output) if output is not None else "table"
    if format_ not in FORMATS:
        raise UsageError(f"format {format_!r} is not known. Use one of: {', '.join(FORMATS)}.")
    return format_


def deliver(run: Run, format_: str, target: Output | None, verbose: bool = False, kept: Path | None = None) -> bool:
    """Write and print; False where the file could not be written, whose text then goes to stdout.

    `kept` is a page or a store that has all notes, beside `target`.
    """
    text, written = render(run, format_, verbose), target is None
    if target is not None:
        try:
            target.write(text)
            written = True
        except OSError as error:
            what = f"output {str(target.path)!r} cannot be written: {error.strerror}"
            tell(visible(f"{what}. The result follows on stdout."))
    console = ResultConsole()
    try:
        if format_ == "table" or (target is not None and written):
            saved = target.path if target is not None and written and format_ == "json" else None
            print_run(run, console, verbose, more=notes_in(kept or saved))
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        console.on_broken_pipe()
    if console.cut and target is None:
        tell("stdout was closed before the end of the result. Give -o FILE to keep it.")
    if target is not None and written:
        print(visible(f"pybatch: wrote {target.path}"), file=sys.stderr)
    return written
