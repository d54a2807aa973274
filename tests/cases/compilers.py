"""What C++ and CUDA compilers made, kept by what they made it of: several processes and runs of tests ask for the same.

It lies in `.pytest_cache`, for a week after it was last asked for.
"""

import fcntl
import hashlib
import os
import subprocess
import time
from functools import cache
from pathlib import Path

from cases.paths import ROOT

PLACE = ROOT / ".pytest_cache" / "compiled"
WEEK_S = 7 * 24 * 3600
SOURCES = {".h", ".cuh", ".cu", ".cpp"}


def compile_once(compiler, options, sources, suffix, includes=()):
    """The file that a compiler makes of these sources.

    Args:
        compiler: its words, as ["c++"].
        options: those without a path.
        sources: files; the first gives the result its name.
        suffix: of the result, as ".so".
        includes: folders of headers, of which all that they hold counts.

    Raises AssertionError with what the compiler says where it fails.
    """
    of = hashlib.sha256(_versions(tuple(compiler)))
    for word in [*compiler, *options]:
        of.update(f"{word}\n".encode())
    headers = [file for folder in includes for file in sorted(Path(folder).iterdir()) if file.suffix in SOURCES]
    for file in [*sources, *headers]:
        text = Path(file).read_bytes()
        of.update(f"{Path(file).name.split('-')[0]} {len(text)}\n".encode() + text)
    made = PLACE / f"{Path(sources[0]).stem.split('-')[0]}-{of.hexdigest()[:32]}{suffix}"
    PLACE.mkdir(parents=True, exist_ok=True)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who waits here finds it made
        if made.exists():
            os.utime(made)
            return made
        _clear()
        unfinished = made.with_name(f"{made.name}.new")
        command = [*compiler, *options, *(f"-I{folder}" for folder in includes), *sources, "-o", unfinished]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.rename(made)
    return made


@cache
def _versions(compiler):
    """Of the compiler and, for -march=native, of the processor."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    flags = [line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith(b"flags")]
    return told + b"".join(flags[:1])


def _clear():
    for file in PLACE.iterdir():
        if file.exists() and time.time() - file.stat().st_mtime > WEEK_S:
            file.unlink(missing_ok=True)
