"""`pybatch watch`: a user's own training script, unchanged, under observation."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from pybatch.base import faults
from pybatch.base.errors import UsageError
from pybatch.base.plain import unwritten, visible
from pybatch.base.progress import LiveLine, ProgressLine
from pybatch.base.terminal import tell
from pybatch.commands import flags
from pybatch.commands.interrupting import interrupts_heard
from pybatch.commands.measuring import INCOMPLETE, INTERRUPTED, check_between, check_price, checked_format, typed
from pybatch.commands.partial import PartialRecord, partial_record
from pybatch.jobs.options import WatchOptions, waiting_for
from pybatch.records import Note, Run
from pybatch.report.formats.text import notes_in, print_run, render
from pybatch.report.output import Output
from pybatch.watch import script
from pybatch.watch.importing import AfterTorch

if TYPE_CHECKING:  # it imports torch
    from pybatch.jobs.watch import Watching

_MODULE = ("-m", "--module")
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}  # what follows the script is its own
_BUDGET = 30.0  # seconds
_REFUSED = 2  # the status of a script whose argparse knows an argument not


class Watch(TyperCommand):
    """A command line that is the script's own behind `-m MODULE`, as Python's is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's."""
        flags = {name for p in self.params for name in p.opts if getattr(p, "is_flag", False)}
        end = _module_ends(args, flags)
        return super().parse_args(ctx, args if end is None else [*args[:end], "--", *args[end:]])


def _module_ends(args: Sequence[str], flags: Container[str]) -> int | None:
    """Where the script's own arguments begin that follow `-m MODULE`; None where there is none before a script.

    Args:
        args: what was typed.
        flags: options that take no value.
    """
    at = 0
    while at < len(args) and args[at].startswith("-") and args[at] != "--":
        name, equals, _ = args[at].partition("=")
        while name[:2] not in _MODULE and len(name) > 2 and name[1] != "-" and name[:2] in flags:
            name = f"-{name[2:]}"  # -qm package
        joined = bool(equals) or (len(name) > 2 and name[1] != "-")  # --module=package, -mpackage
        at += 1 if joined or name in flags else 2
        if name[:2] == _MODULE[0] or name == _MODULE[1]:
            return at if at <= len(args) else None
    return None


COMMAND = Watch


def watch(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT [ARGS]...", help="The script, and its own arguments.")
    ] = None,
    module: Annotated[
        str | None, typer.Option("-m", "--module", metavar="MODULE", help="Run a module, as python -m does.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="End the script after so many steps. Default: when it ends.")
    ] = None,
    optimizer_index: Annotated[
        int | None, typer.Option(help="Of several optimizers, by first step, from 0. Default: most parameters.")
    ] = None,
    time_budget: Annotated[
        float, typer.Option(help="Seconds at the end for other batch sizes: the last pass, run again.")
    ] = _BUDGET,
    html: Annotated[Path | None, typer.Option(help="Write the report here as well: one HTML page.")] = None,
    format_: flags.Format = None,
    output: flags.Output = None,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
    price: flags.Price = None,
) -> None:
    """Your own training script, unchanged: its noise, capacity around its batch, waiting for data, and the verdict."""
    check_between("steps", steps, 3, 2**31)
    check_between("optimizer index", optimizer_index, 0, 1000)
    check_between("time budget", time_budget, 1, 1e8)
    check_price(price)
    given = list(arguments or [])
    if module is None and not given:
        raise UsageError("no script was given. Write 'pybatch watch train.py', or 'pybatch watch -m package.train'.")
    kind = checked_format(format_, output)
    program = script.find(module or given.pop(0), given, module=module is not None)
    name = module or Path(program.name).name
    options = WatchOptions(name, steps, optimizer_index, time_budget, typed())
    out = _Out(kind, output, html, quiet, verbose, price)
    raise typer.Exit(_watched(program, options, out))


def misplaced(typed: Sequence[str], option: str) -> str:
    """What to do about an option that is none of this command's.

    Args:
        typed: what stands behind 'pybatch watch'.
        option: the one that is not known.
    """
    name = next((word for word in typed if word.endswith(".py") and not word.startswith("-")), "train.py")
    return (
        f"Options before the script are pybatch's: see 'pybatch watch --help'. The script's own follow it: "
        f"'pybatch watch {shlex.quote(name)} {option} ...'."
    )


def _strayed(arguments: Sequence[str]) -> str | None:
    """The first of a script's arguments that is an option of this command, which it may have been meant for."""
    named = [name.rstrip("_").replace("_", "-") for name in inspect.signature(watch).parameters]
    own = {"-o", "-q", "-v", *(f"--{name}" for name in named)}
    return next((word for word in arguments if word.partition("=")[0] in own), None)


def _watched(program: script.Program, options: WatchOptions, out: _Out) -> int:
    """Run the script to its end, then tell; the exit status."""
    begun: list[Watching] = []
    console = Console(stderr=True)
    with LiveLine(console, out.quiet) as line:

        def begin() -> None:
            from pybatch.jobs.watch import Watching

            watching = Watching(options, say=line.line, progress=line, on_partial=out.partial)
            begun.append(watching)
            watching.start()

        waiting = AfterTorch(begin)
        ending = program.run()
        waiting.remove()
    if ending.how != "error":  # its traceback stays the last on the screen
        script.tell(ending)
    stray = _strayed(program.arguments) if ending.how == "exit" and ending.status == _REFUSED else None
    if stray is not None:
        out.say(f"{stray} came after the script, and so went to it. pybatch's own options stand before the script")
    try:
        return _told(begun[0] if begun else None, ending, out, console)
    finally:
        if ending.how == "error":
            script.tell(ending)


def _told(watching: Watching | None, ending: script.Ending, out: _Out, console: Console) -> int:
    """Measure what is left, deliver the record; the exit status."""
    if watching is None:
        never = "the script never imported torch, so that there was no training to watch"
        out.nothing(_own_end(ending) or never)
        return ending.status
    status = ending.status
    if ending.how == "interrupt" and watching.rank == 0 and watching.watches and not out.quiet:
        out.say(waiting_for(watching.options.time_budget))
    try:
        with interrupts_heard(), ProgressLine(console, out.quiet or watching.rank > 0) as bar:
            watching.progress = bar
            run = watching.finish(*_notes(ending), measure=ending.how != "error")
    except KeyboardInterrupt:
        status = INTERRUPTED
        run = watching.finish(Note("run", "interrupted before its last pass was run again"), measure=False)
    except Exception as error:
        return status or faults.tell(error)
    if watching.fault is not None:
        faults.tell(watching.fault, "; the script was left alone")
    if watching.rank > 0:
        return status
    if run is None:
        out.nothing(_own_end(ending) or watching.problem)
        return status
    failed = out.deliver(run, shown=ending.how != "error")
    return status or failed


def _own_end(ending: script.Ending) -> str | None:
    """Why nothing was measured, where an error ended the script before it came as far as a training."""
    if ending.how != "error":
        return None
    return f"nothing was measured: {type(ending.error).__name__} ended the script before a training was seen"


def _notes(ending: script.Ending) -> tuple[Note, ...]:
    if ending.how == "error":
        return (Note("run", f"cut: the script ended by {type(ending.error).__name__}"),)
    if ending.how == "interrupt":
        return (Note("run", "the script was interrupted by Ctrl-C; what was measured until then stands"),)
    return ()


class _Out:
    """Where a watched run goes: files, and stderr, as stdout is the script's. Known to be writable from the start."""

    def __init__(
        self, kind: str, output: Path | None, html: Path | None, quiet: bool, verbose: bool, price: float | None
    ) -> None:
        self.kind, self.quiet, self.verbose, self.price = kind, quiet, verbose, price
        self.output = output.absolute() if output is not None else None  # the script may change the folder
        self.html = html.absolute() if html is not None else None
        for path in (self.output, self.html):
            if path is not None:
                Output(path).discard()
        kept: PartialRecord | None = partial_record(output, kind, False)
        self._partial = kept
        self.partial = kept.write if kept is not None else None

    def say(self, text: str) -> None:
        """A line of pybatch's own."""
        tell(visible(text))

    def nothing(self, problem: str) -> None:
        """Why there is no record, and which files are not written for it."""
        self.say(unwritten(problem, self.output, self.html))

    def deliver(self, run: Run, shown: bool = True) -> int:
        """Write and print; the status where it can't be written."""
        if self.price is not None:
            run = replace(run, price=self.price)
        status = 0
        if not shown:  # in one line: the traceback is what is looked for
            if run.noise is not None and run.noise.status != "unresolved" and not self.quiet:
                self.say(f"until then {run.noise}")
        elif self.kind == "table" or self.output is not None:
            saved = self.output if self.kind == "json" else None
            print_run(run, Console(stderr=True), self.verbose, more=notes_in(self.html or saved))
        else:
            sys.stderr.write(render(run, self.kind, self.verbose))
        if self.output is not None:
            status = self._write(self.output, lambda file: file.write(render(run, self.kind, self.verbose)))
            if not status and self._partial is not None:
                self._partial.discard()
        if self.html is not None:
            from pybatch.report.formats.html import page

            status = self._write(self.html, lambda file: file.write(page([run]))) or status
        return status

    def _write(self, path: Path, write: Callable[[Output], None]) -> int:
        try:
            with Output(path) as file:
                write(file)
        except (OSError, UsageError) as error:
            self.say(f"{str(path)!r} cannot be written: {error}")
            return INCOMPLETE
        self.say(f"wrote {path}")
        return 0
