"""A Python script or module run as `__main__`, as `python script.py` and `python -m module` run it. No torch."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pybatch.base.errors import UsageError
from pybatch.base.plain import said

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Of pybatch's, whose frames are no part of the script's traceback.
ROOMS = tuple(os.path.join(_PACKAGE, room, "") for room in ("watch", "noise"))
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True)
class Ending:
    """How a script ended."""

    how: Literal["end", "exit", "error", "interrupt"]
    status: int
    error: BaseException | None = None
    message: object = None  # of sys.exit("text")


@dataclass
class Program:
    """What is run: found and compiled before anything of it runs."""

    name: str  # as the user typed it
    path: str
    code: types.CodeType
    first_path: str  # sys.path[0]
    arguments: list[str]
    spec: Any = None
    package: str | None = None

    def run(self) -> Ending:
        """Run it as `__main__` with its own arguments and path, which stay: what it started may need them."""
        main = types.ModuleType("__main__")
        main.__dict__.update(
            __file__=self.path,
            __spec__=self.spec,
            __package__=self.package,
            __loader__=importlib.machinery.SourceFileLoader("__main__", self.path),
            __cached__=None,
            __builtins__=__builtins__,
        )
        sys.modules["__main__"] = main
        sys.argv[:] = [self.path if self.spec is not None else self.name, *self.arguments]
        sys.path[0] = self.first_path
        if sys.excepthook.__module__.startswith("typer"):  # the command line's, which is none of the script's
            sys.excepthook = sys.__excepthook__
        try:
            exec(self.code, main.__dict__)
        except SystemExit as stop:
            return _ended(stop)
        except KeyboardInterrupt as error:
            return Ending("interrupt", INTERRUPTED, error)
        except BaseException as error:
            return Ending("error", 1, error)
        return Ending("end", 0)


def find(target: str, arguments: Sequence[str], *, module: bool = False) -> Program:
    """The script at a path, or the module of a name, with the arguments it gets.

    Raises:
        UsageError: there is no such script or module, or it is no Python.
    """
    if module:
        return _module(target, list(arguments))
    path = Path(target)
    if path.is_dir() and (path / "__main__.py").is_file():
        inner = path / "__main__.py"
        return Program(target, str(inner), _compiled(inner, target), str(path), list(arguments))
    if path.is_dir():
        raise UsageError(f"script {said(target)} is a folder without __main__.py. Name a file, or -m MODULE.")
    if not path.is_file():
        near = [p.name for p in sorted(path.parent.glob("*.py"))[:5]] if path.parent.is_dir() else []
        there = f" Here are: {', '.join(near)}." if near else ""
        raise UsageError(f"script {said(target)} is not there. Name a Python file, or -m MODULE.{there}")
    whole = path.absolute()  # as Python has it in __file__ and tracebacks
    return Program(
        target, str(whole), _compiled(whole, target), os.path.dirname(os.path.realpath(path)), list(arguments)
    )


def _compiled(path: Path, target: str) -> types.CodeType:
    try:
        with io.open_code(str(path)) as file:
            return compile(file.read(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"script {said(target)} cannot be read: {error.strerror}. Name another.") from None
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        why = error.msg if isinstance(error, SyntaxError) else error
        raise UsageError(f"script {said(target)}{where} is no Python: {why}. Does 'python {target}' run?") from None


def _module(name: str, arguments: list[str]) -> Program:
    folder = os.getcwd()
    sys.path[0] = folder  # where `python -m` looks first
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise UsageError(f"module {said(name)} is a package without __main__. Name a module in it.")
    except UsageError:
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"module {said(name)} cannot be found: {error}. Name one that 'python -m' runs.") from None
    loader: Any = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None or spec.origin is None:
        raise UsageError(f"module {said(name)} cannot be found from {folder}. Name one that 'python -m' runs.")
    return Program(name, spec.origin, code, folder, arguments, spec, spec.parent)


def _ended(stop: SystemExit) -> Ending:
    code = stop.code
    if code is None:
        return Ending("exit", 0, stop)
    if isinstance(code, int):
        return Ending("exit", code & 0xFF, stop)
    return Ending("exit", 1, stop, code)


def tell(ending: Ending) -> None:
    """Say what Python would say on stderr of a script that ended so: its traceback, without frames that are not its."""
    if ending.message is not None:
        print(ending.message, file=sys.stderr)
    if ending.how in ("error", "interrupt") and ending.error is not None:
        error = ending.error
        _clean(error, set())
        sys.excepthook(type(error), error, error.__traceback__)


def _clean(error: BaseException | None, seen: set[int]) -> None:
    """Leave out frames of the watch, here and in what the error came from."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    frames = []
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(ROOMS):
            frames.append(trace)
        trace = trace.tb_next
    kept: types.TracebackType | None = None
    for one in reversed(frames):
        kept = types.TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    error.__traceback__ = kept
    _clean(error.__cause__, seen)
    _clean(error.__context__, seen)
