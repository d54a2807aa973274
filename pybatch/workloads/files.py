"""Reading the user's data files: what is missing, truncated or foreign is an error that names the file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from pybatch.base.errors import UsageError


def folder(data: str, wanted: str) -> Path:
    """The folder `data`; `wanted` says what it should hold."""
    path = Path(data)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"data '{data}' {found}. Give the folder that holds {wanted}.")
    return path


def read(path: Path) -> bytes:
    """All bytes of a file, unpacked where its name ends in .gz."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"data '{path}' cannot be read: {error.strerror}. Give a file that can be.") from None
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"data '{path}' is not a whole gzip file: {error}. Fetch it again.") from None


def one_of(place: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that the folder has."""
    for name in names:
        if (place / name).is_file():
            return place / name
    raise UsageError(f"data '{place}' has no file {' or '.join(names)}. Give the folder that holds it.")


def foreign(path: Path, expected: str, found: str) -> UsageError:
    """The error for a file that is not what it should be."""
    return UsageError(
        f"data '{path}' is not {expected}: {found}. It is truncated or of another format; fetch it again."
    )
