"""Progress on stderr: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pybatch.base.plain import visible

P = ParamSpec("P")
R = TypeVar("R")
_EVERY = 5.0  # s between plain lines: a log stays short, a reader sees that it lives


class ProgressLine:
    """Callable `(text, share done)` for the measuring functions; a context manager for the terminal's sake."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._said = "", 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            columns = (BarColumn(20), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, text: str, share: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=visible(text), completed=min(1.0, max(0.0, share)))
            return
        stage, now = text.split(":", 1)[0], time.monotonic()
        if not self._quiet and (stage != self._stage or now - self._said >= _EVERY):
            self._stage, self._said = stage, now
            self._console.print(f"pybatch: {visible(text)}", markup=False, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """A line that stays, above the live one."""
        if not self._quiet:
            self._console.print(f"pybatch: {visible(text)}", markup=False, highlight=False, soft_wrap=True)


def line_of(progress: Callable[[str, float], None]) -> Callable[[str], None]:
    """What says a line that stays, where this progress has that; else nothing."""
    found: Callable[[str], None] = getattr(progress, "line", lambda text: None)
    return found


def looked_at() -> bool:
    """Whether somebody looks at stderr while it is written: on a terminal, or in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell" or (sys.stderr is not None and sys.stderr.isatty())


def told(measure: Callable[P, R]) -> Callable[P, R]:
    """Give a measuring function a progress line where its caller gave none and somebody looks at stderr."""

    @functools.wraps(measure)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("progress") is not None or not looked_at():
            return measure(*args, **kwargs)
        with ProgressLine(Console(stderr=True)) as line:
            kwargs["progress"] = line
            return measure(*args, **kwargs)

    return call


class LiveLine:
    """A line on a terminal that another program writes to as well: told anew, and written over by what that prints.

    Not on a terminal it says nothing but the lines that stay.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def __call__(self, text: str, share: float = 0.0) -> None:
        """The state, in place of the one before."""
        if self._console.is_terminal and not self._quiet:
            line = visible(f"pybatch: {text}")[: max(20, self._console.width - 1)]
            self._console.file.write(f"\r\x1b[2K{line}\r")
            self._console.file.flush()
            self._shown = True

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        if not self._quiet:
            self._console.print(f"pybatch: {visible(text)}", markup=False, highlight=False, soft_wrap=True)

    def _clear(self) -> None:
        if self._shown:
            self._console.file.write("\r\x1b[2K")
            self._console.file.flush()
            self._shown = False
