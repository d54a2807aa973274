"""Errors on stderr: wrapped where it is a terminal, and never within what one would copy."""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
from typing import Any, TextIO

_UNKNOWN = 80  # columns of a terminal that does not say how many it has
_LEAST = 20  # narrower ones are taken for this wide
_QUOTED = re.compile(r"(?<![\w'])'[^'\n]*'(?!\w)")  # a command or a path with spaces; no apostrophe within a word
_HELD = "\ufffc"  # stands for a space that is no place to break; `visible` text has none


class _Heedless(io.RawIOBase):
    """A file descriptor whose reader may go away: what is written then goes nowhere, and nothing fails for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self._descriptor, data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)
            return len(data)


def heedless(stream: TextIO) -> TextIO:
    """A text stream like this one that outlives its reader, such as `grep -q`; itself where it is no file."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    raw = io.BufferedWriter(_Heedless(descriptor))
    return io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True)


def tell(text: str) -> None:
    """Print an error on stderr after the program's name."""
    print(wrapped(f"pybatch: {text}", columns_of(sys.stderr)), file=sys.stderr)


def columns_of(stream: TextIO) -> int | None:
    """How wide a terminal is; None where the stream is none, as in a pipe, a file or a notebook."""
    if not stream.isatty():
        return None
    try:
        found = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        found = 0
    if found <= 0:
        try:
            found = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):  # ValueError: it has no file descriptor
            found = 0
    return max(found, _LEAST) if found > 0 else _UNKNOWN


def wrapped(text: str, columns: int | None) -> str:
    """The text with lines of so many columns at most; words, and what stands in single quotes, are never cut."""
    if columns is None:
        return text
    return "\n".join(_folded(line, columns) for line in text.split("\n"))


def _folded(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    held = _QUOTED.sub(lambda match: match[0].replace(" ", _HELD), line)
    return textwrap.fill(held, columns, break_long_words=False, break_on_hyphens=False).replace(_HELD, " ")
