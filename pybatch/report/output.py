"""An output file that is known to be writable before anything is measured, and is never left half-written."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
from pathlib import Path
from typing import Self

from pybatch.base.errors import UsageError

_SUFFIX = ".writing"  # of a temporary file
_OLD = 3600.0  # s


class Output:
    """A file to be written at the end of a run. Construct it before measuring: it raises UsageError if it can't be.

    A context manager, which discards what was not written.

    The text goes to a temporary file beside the target, which then takes its place in one step: a reader, or a run
    cut off, sees the old file or the new one. A target that exists and is no regular file (a pipe, a terminal) is
    written directly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path  # as it is named in messages
        path = self._place = path.absolute()  # what runs later may change the working directory
        self._temporary: Path | None = None
        if path.is_dir():
            raise UsageError(f"output {str(self.path)!r} is a folder. Name a file in it.")
        if path.exists() and not path.is_file():
            return
        try:
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError("it is write-protected")
            _clear_leftovers(path)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
            os.close(handle)
        except OSError as error:
            raise UsageError(
                f"output {str(self.path)!r} cannot be written: {error.strerror or error}. "
                "Nothing was measured yet; name another path."
            ) from None
        self._temporary = Path(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.discard()

    def write(self, text: str) -> None:
        """Put the text in place, as UTF-8. Raises OSError where that fails only now, as on a full disk."""
        if self._temporary is None:
            self._place.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        self._temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        # mkstemp makes the file private; a result is as readable as any file the user makes.
        mask = os.umask(0)
        os.umask(mask)
        self._temporary.chmod(0o666 & ~mask)
        os.replace(self._temporary, self._place)
        self._temporary = None

    def discard(self) -> None:
        """Take back the temporary file of a run that failed. Safe to call twice, and after `write`."""
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def _clear_leftovers(path: Path) -> None:
    """Take away what processes that were killed have left of this file; one that still runs writes its own anew."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                left.unlink()
