"""Ctrl-C is heard wherever it falls, and SIGTERM as one."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LATER = 0.05  # s


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """Raise KeyboardInterrupt anew where Python would drop it: in a finalizer, as the garbage collector calls them.

    Collecting takes a good part of a second between batch sizes, and a signal that comes meanwhile is handled in the
    first Python code that runs, which may be the finalizer of something collected.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # Not at once: raised in this hook it would be dropped as well.
            again = threading.Timer(_LATER, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def termination_heard() -> Iterator[None]:
    """Take the first SIGTERM, as batch systems send it at a job's time limit, for Ctrl-C; the second one ends at once.

    Only for work of one process: one of several that waits for the others would not come to hear it.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python
