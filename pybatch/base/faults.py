"""What pybatch did not foresee: one sentence on the screen, the traceback in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from pybatch.base import terminal
from pybatch.base.plain import shortened, visible

STATUS = 70  # sysexits.h: EX_SOFTWARE
_WHERE = "where you got pybatch from"


def tell(error: BaseException, stage: str = "") -> int:
    """Say on stderr that pybatch itself failed, and where the traceback is; the exit status."""
    cause = shortened(visible(": ".join([type(error).__name__, *str(error).splitlines()[:1]])))
    path = _kept("".join(traceback.format_exception(error)))
    trace = f"Please report it {_WHERE}, with the traceback in {path}" if path else f"Please report it {_WHERE}"
    terminal.tell(f"a fault of pybatch itself{stage} ({cause}). {trace}.")
    return STATUS


def _kept(text: str) -> str | None:
    """The path of a new file with this text and the command; None where none can be written: then it is printed."""
    try:
        handle, path = tempfile.mkstemp(prefix="pybatch-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sys.argv}\nPython {sys.version}\n\n{text}")
    except OSError:
        sys.stderr.write(visible(text, lines=True))
        return None
    return path
