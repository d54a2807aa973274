"""The result on stdout: what a workload prints must not mix with it, and its reader may stop before the end."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from rich.console import Console


class ResultConsole(Console):
    """rich's on stdout; where the reader, such as `head`, has seen enough, the rest is dropped.

    rich would end the program there, with status 1 and all that was still to be done left undone.
    """

    cut = False  # whether the reader did not see all of it

    def on_broken_pipe(self) -> None:
        """As rich's, and go on."""
        self.cut = self.quiet = True
        drop_stdout()


def drop_stdout() -> None:
    """Nobody reads it any more: what comes now goes nowhere."""
    with suppress(OSError, ValueError):  # it is closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """In this context what Python, C code and child processes write to stdout goes to stderr."""
    with redirect_stdout(sys.stderr):
        try:
            kept = os.dup(1)
        except OSError:  # closed: nothing comes out there
            yield
            return
        try:
            os.dup2(2, 1)
        except OSError:  # there is no stderr
            os.close(kept)
            yield
            return
        try:
            yield
        finally:
            _flush_c()
            os.dup2(kept, 1)
            os.close(kept)


def _flush_c() -> None:
    """Write out what C's stdio holds back: it would follow the result, at the end of the process."""
    try:
        flush = ctypes.CDLL(None).fflush
    except (OSError, AttributeError):
        return
    flush(None)
