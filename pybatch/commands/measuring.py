"""What every measuring command does around its job: flags, progress, delivering the record, exit status."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from pybatch.base.errors import Interrupted, UsageError
from pybatch.base.progress import ProgressLine
from pybatch.commands.interrupting import interrupts_heard
from pybatch.commands.printing import stdout_to_stderr
from pybatch.records import Run
from pybatch.report.formats.text import FORMATS, format_of, print_run, render
from pybatch.report.output import Output

if TYPE_CHECKING:  # these import torch
    import torch

    from pybatch.workloads.base import Workload

DONE, BROKEN, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
BUDGET = 70.0  # seconds


def numbers(name: str, text: str, pattern: str, example: str) -> list[float]:
    """A list of numbers as typed, each of this form."""
    parts = [part.strip() for part in text.split(",")]
    bad = next((part for part in parts if not re.fullmatch(pattern, part, re.ASCII)), None)
    if bad is not None:
        raise UsageError(f"{name} {text!r}: {bad!r} is no such number. Write '{example}'.")
    return [float(part) for part in parts]


def check_budget(seconds: float) -> None:
    if not 1 <= seconds < float("inf"):
        raise UsageError(
            f"time budget {seconds:g} s is out of range. Give at least 1 second; the default is {BUDGET:g}."
        )


def typed() -> str:
    """What the user typed, for the record."""
    return shlex.join(["pybatch", *sys.argv[1:]])


@dataclass(frozen=True)
class Shared:
    """What every command that measures takes."""

    workload: str
    model: str | None
    data: str | None
    option: list[str] | None
    gpu: int | None
    cpu: bool
    dtype: str
    seed: int
    format: str | None
    output: Path | None
    quiet: bool
    size: str | None = None


def measure(
    job: Callable[[Workload, torch.device, ProgressLine], Run | None],
    given: Shared,
    then: Callable[[Run, bool], int] = lambda run, delivered: DONE,
) -> NoReturn:
    """Check the flags, run the job with progress, deliver its record, and leave with the exit status.

    `then` is called with the record and whether it was written where it should be; what it returns is the status where
    nothing else is wrong.
    """
    format_ = checked_format(given.format, given.output)
    if given.gpu is not None and given.cpu:
        raise UsageError("--gpu and --cpu exclude each other. Give one of them.")
    if not 0 <= given.seed < 2**63:
        raise UsageError(f"seed {given.seed} is out of range. Give a whole number from 0 to 2**63 - 1.")
    target = Output(given.output) if given.output is not None else None
    run: Run | None = None
    try:
        # Torch takes seconds to import: what can be refused without it has been by now.
        import torch

        from pybatch.capacity.distributed import launched, local_rank
        from pybatch.device.identity import resolve
        from pybatch.workloads.running.finding import find
        from pybatch.workloads.running.session import checked_dtype

        checked_dtype(given.dtype)
        gpu = given.gpu
        if launched() and not given.cpu and gpu is None and torch.cuda.is_available():
            gpu = local_rank()
        device = resolve("cpu" if given.cpu else f"cuda:{gpu}" if gpu is not None else None)
        options = given.option or ()
        with stdout_to_stderr():
            chosen = find(given.workload, model=given.model, data=given.data, options=options, size=given.size)
        try:
            quiet = given.quiet or local_rank() > 0
            line = ProgressLine(Console(stderr=True), quiet)
            with stdout_to_stderr(), interrupts_heard(), line as progress:
                measured = job(chosen, device, progress)
            if measured is None:  # one of torchrun's processes: the first one has the result
                raise typer.Exit(DONE)
            run = measured
        except Interrupted as stop:
            run = stop.partial
        delivered = deliver(run, format_, target)
        status = then(run, delivered)
    except KeyboardInterrupt:
        when = "before anything was measured; nothing was written" if run is None else "while the result was written"
        print(f"pybatch: interrupted {when}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if target is not None:
            target.discard()
    raise typer.Exit(status if run.complete and delivered else INCOMPLETE)


def checked_format(format_: str | None, output: Path | None) -> str:
    if format_ is None:
        return format_of(output) if output is not None else "table"
    if format_ not in FORMATS:
        raise UsageError(f"format {format_!r} is not known. Use one of: {', '.join(FORMATS)}.")
    return format_


def deliver(run: Run, format_: str, target: Output | None) -> bool:
    """Write and print; False where the file could not be written, whose text then goes to stdout."""
    text, written = render(run, format_), target is None
    if target is not None:
        try:
            target.write(text)
            written = True
        except OSError as error:
            what = f"output {str(target.path)!r} cannot be written: {error.strerror}"
            print(f"pybatch: {what}. The result follows on stdout.", file=sys.stderr)
    try:
        if format_ == "table" or (target is not None and written):
            print_run(run, Console())
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if target is None:
            print("pybatch: stdout was closed before the end of the result. Give -o FILE to keep it.", file=sys.stderr)
    if target is not None and written:
        print(f"pybatch: wrote {target.path}", file=sys.stderr)
    return written
