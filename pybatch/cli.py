"""The command line: flags in, calls out. Results go to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a condition of --fail-on does not hold, and nothing else; 2 bad arguments or records, a missing
device, or a workload that fails at once; 3 ran but incomplete, with what was measured written all the same; 70 a fault
of pybatch itself; 130 interrupted before anything was measured.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from pybatch.base import faults, terminal
from pybatch.base.errors import PybatchError
from pybatch.base.plain import shortened, visible

_DONE, _BAD_INPUT, _INCOMPLETE = 0, 2, 3  # exit status
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # no fault of pybatch's, nor of what was typed
_CommandLineError: type[Exception] = cast(
    type[Exception], typer.BadParameter.__mro__[2]
)  # click's own, wherever typer has click from
_STYLE: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}

# Its function in pybatch.commands, and the first line of that function's help: listing the commands imports none.
COMMANDS = {
    "bench": ("bench:bench", "Capacity, noise and verdict: the batch size to use for this workload on this device."),
    "sweep": (
        "sweep:sweep",
        "Steps to a loss target against batch size, for each learning-rate rule, and the critical batch.",
    ),
    "branch": (
        "branch:branch",
        "The critical batch along training, by branching from checkpoints with other batch sizes.",
    ),
    "fit": (
        "fit:fit",
        "The critical batch from your own logs: steps to a target at several batch sizes, from a CSV file.",
    ),
    "schedule": (
        "schedule:schedule",
        "A batch-size schedule: fewer steps for the same examples, from what was measured along a run.",
    ),
    "watch": (
        "watch:watch",
        "Your own training script, unchanged: its noise, capacity around its batch, waiting for data, and the verdict.",
    ),
    "plan": ("plan:plan", "Micro-batch, accumulation and devices for a global batch, as your trainer spells them."),
    "report": (
        "saved:report",
        "One self-contained HTML page from saved runs and sweeps, for a browser without a network; "
        "or text, or figures.",
    ),
    "compare": ("saved:compare", "What changed between two saved runs, with intervals."),
    "doctor": (
        "doctor:doctor",
        "What is compiled, which devices are there, which counters can be read, and why one can't.",
    ),
    "list": ("doctor:list_", "The workloads and optimizers that ship."),
}


class Commands(TyperGroup):
    """Imports the module of the one command that is typed: others need scipy or torch, which take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        alone = typer.Typer(**_STYLE)
        named = importlib.import_module(f"pybatch.commands.{module}")
        settings = getattr(named, "CONTEXT", None)  # of a command that leaves arguments to another program
        kind = getattr(named, "COMMAND", None)
        alone.command(cmd_name, cls=kind, context_settings=settings)(getattr(named, function))
        return typer.main.get_command(alone)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click's; a name that is not known is answered with the nearest."""
        near = difflib.get_close_matches(args[0], COMMANDS, 1) if args[0] not in COMMANDS else []
        if near:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The section of the help that lists them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="What batch size, on how many devices, and what does going further cost? Measured on your model and device.",
    **_STYLE,
)


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
    if "OMP_WAIT_POLICY" not in os.environ and sys.argv[1:2] != ["watch"]:  # a script's training is left as it is
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def main() -> None:
    """The `pybatch` command."""
    _shorten_spinning()
    # Closed by the caller (`>&-`): what is printed there is dropped, not taken for a fault or put on the other stream.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign must not lose the result
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = terminal.heedless(sys.stderr)  # the exit status is the command's, whoever reads what it says
    sys.exit(_flushed(_run()))


def _run() -> int:
    """Do the command; the exit status, which only the command itself may set to 1."""
    try:
        return int(app(standalone_mode=False) or _DONE)
    except PybatchError as error:
        return _refused(str(error))
    except _CommandLineError as error:
        return _refused(_said(error))
    except typer.Abort:
        return _refused("the input ended before the command had all of it")
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_stdout()
        return _DONE
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _refused(f"{str(error.filename)!r} is too long for the name of a file. Give a shorter one.")
        if error.errno not in _FULL:
            return faults.tell(error)
        _drop_stdout()
        what = repr(error.filename) if error.filename else "stdout"
        terminal.tell(f"{what} cannot be written: {error.strerror}. Free some space, or name another.")
        return _INCOMPLETE
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's way to say so
            _drop_stdout()
            return _DONE
        return faults.tell(error)
    except Exception as error:
        return faults.tell(error)


def _drop_stdout() -> None:
    """Nobody reads it any more."""
    from pybatch.commands.printing import drop_stdout

    drop_stdout()


def _refused(message: str) -> int:
    terminal.tell(shortened(visible(message, lines=True)))
    return _BAD_INPUT


def _said(error: Any) -> str:
    """What is wrong with the command line, and how to find out what is right; the help where nothing was typed."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"no command was given.\n{error.format_message()}"
    path = context.command_path if context is not None else "pybatch"
    if path == "pybatch watch" and type(error).__name__ == "NoSuchOption":
        from pybatch.commands.watch import misplaced

        return f"{error.format_message()}. {misplaced(sys.argv[2:], error.option_name)}"
    return f"{error.format_message()} See '{path} --help'."


def _flushed(status: int) -> int:
    """The status once all is written; what stdout's device refuses to take is told, not left to the end of Python."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        terminal.tell(f"stdout cannot be written: {error.strerror}. Give -o FILE, or free some space.")
        return status or _INCOMPLETE
    return status
