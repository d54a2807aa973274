"""The command line: flags in, calls out. Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a condition of --fail-on does not hold; 2 bad arguments, a missing device, or a workload that
fails at once; 3 ran but incomplete, with what was measured written all the same; 130 interrupted before anything was
measured.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pybatch.commands import saved
from pybatch.errors import Interrupted, PybatchError, UsageError
from pybatch.ranges import parse_batches
from pybatch.records import Run
from pybatch.report.formats import FORMATS, format_of, print_run, render
from pybatch.report.output import Output
from pybatch.report.progress import ProgressLine

DONE, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="What batch size, on how many devices, and what does going further cost? Measured on your model and device.",
)


app.command()(saved.report)
app.command()(saved.compare)


@app.command()
def bench(
    workload: Annotated[str, typer.Option(help="A workload of 'pybatch list', or your own: FILE.py:CLASS.")] = "digits",
    model: Annotated[str | None, typer.Option(help="One of the workload's models.")] = None,
    data: Annotated[str | None, typer.Option(help="The workload's data, where it takes a file or folder.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="A dial of the workload as KEY=VALUE, see 'pybatch list'; any number.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes: '1,2,8', '16-4096*2', '16-64+16'. Default: chosen by measuring.")
    ] = None,
    gpu: Annotated[int | None, typer.Option(help="Measure on this GPU. Default: GPU 0 if there is one.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Measure on the CPU.")] = False,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 (autocast over fp32 parameters).")] = "fp32",
    time_budget: Annotated[float, typer.Option(help="Seconds for all measurements together.")] = 70.0,
    seed: Annotated[int, typer.Option(help="Of the model, the data order and the resampling.")] = 0,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="table, md, json, jsonl or csv. Default: table; with -o, by its ending."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result here; the table is still printed.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Capacity, noise and verdict: the batch size to use for this workload on this device."""
    batches = parse_batches(batch) if batch is not None else None
    format_ = _checked_format(format_, output)
    if gpu is not None and cpu:
        raise UsageError("--gpu and --cpu exclude each other. Give one of them.")
    if not 1 <= time_budget < float("inf"):
        raise UsageError(f"time budget {time_budget:g} s is out of range. Give at least 1 second; the default is 70.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range. Give a whole number from 0 to 2**63 - 1.")
    target = Output(output) if output is not None else None
    try:
        # Torch takes seconds to import: what can be refused without it has been by now.
        import torch

        from pybatch.bench import run_bench
        from pybatch.capacity.distributed import launched, local_rank
        from pybatch.device.identity import resolve
        from pybatch.together import run_bench_together
        from pybatch.workloads.finding import find
        from pybatch.workloads.session import checked_dtype

        checked_dtype(dtype)
        if launched() and not cpu and gpu is None:
            gpu = local_rank() if torch.cuda.is_available() else None
        device = resolve("cpu" if cpu else f"cuda:{gpu}" if gpu is not None else None)
        chosen = find(workload, model=model, data=data, options=option or ())
        try:
            with ProgressLine(Console(stderr=True), quiet or (launched() and local_rank() > 0)) as progress:
                measured = (run_bench_together if launched() else run_bench)(
                    chosen,
                    device=device,
                    dtype=dtype,
                    batches=batches,
                    time_budget=time_budget,
                    seed=seed,
                    command=shlex.join(["pybatch", *sys.argv[1:]]),
                    progress=progress,
                )
                if measured is None:  # one of torchrun's processes: the first one has the result
                    raise typer.Exit(DONE)
                run = measured
        except Interrupted as stop:
            run = stop.partial
        delivered = _deliver(run, format_, target)
    except KeyboardInterrupt:
        print("pybatch: interrupted before anything was measured; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if target is not None:
            target.discard()
    raise typer.Exit(DONE if run.complete and delivered else INCOMPLETE)


def _checked_format(format_: str | None, output: Path | None) -> str:
    if format_ is None:
        return format_of(output) if output is not None else "table"
    if format_ not in FORMATS:
        raise UsageError(f"format {format_!r} is not known. Use one of: {', '.join(FORMATS)}.")
    return format_


def _deliver(run: Run, format_: str, target: Output | None) -> bool:
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
    if target is not None and written:
        print(f"pybatch: wrote {target.path}", file=sys.stderr)
    return written


@app.command()
def doctor() -> None:
    """What is compiled, which devices are there, which counters can be read, and why one can't."""
    from pybatch.doctor import examine

    _print_findings(examine())


@app.command("list")
def list_() -> None:
    """The workloads and optimizers that ship."""
    from pybatch.doctor import catalogue

    _print_findings(catalogue())


def _print_findings(findings: list[tuple[str, list[tuple[str, str]]]]) -> None:
    console = Console()
    width = max(len(name) for _, rows in findings for name, _ in rows)
    for heading, rows in findings:
        console.print(Text(heading, style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=width, no_wrap=True)
        for name, text in rows:
            grid.add_row(Text(name), Text(text))
        console.print(Padding(grid, (0, 0, 0, 2)))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"pybatch {installed('pybatch')}")
        raise typer.Exit


def _shorten_spinning() -> None:
    """Waiting OpenMP threads shall spin for some 20 us, then sleep. libgomp reads this when torch is imported.

    It spins for milliseconds by default: on a machine with anything else to do, threads wait for each other's time
    slices, and a step of 0.4 ms takes 90 ms. On an idle one this changes little. A user's own setting is kept;
    the record's environment names whichever holds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main() -> None:
    """The `pybatch` command."""
    _shorten_spinning()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not lose the result
    try:
        app()
    except PybatchError as error:
        print(f"pybatch: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
