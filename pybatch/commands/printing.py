"""What a workload prints must not mix with the result on stdout."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


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
