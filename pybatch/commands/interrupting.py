"""Ctrl-C is heard wherever it falls."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
