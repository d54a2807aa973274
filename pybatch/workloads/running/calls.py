"""Calls of a workload's methods that do not return: told with the user's line they stand at, and ended in time."""

from __future__ import annotations

import contextlib
import linecache
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

TOLD = 30.0  # s after which a call is told of
_LOOK = 0.25  # s between looks
_AGAIN = 5.0  # s between tries to end one, which user code may have swallowed
_TRIES = 3  # after which it is given up
_OWN = Path(__file__).resolve().parents[2]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@dataclass
class Call:
    """One call on its way."""

    name: str  # "Mine.batch()"
    since: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)
    told: bool = False
    ended: str | None = None  # why it was ended, in words that follow the name
    tried: float = 0.0
    tries: int = 0


_now: Call | None = None  # of this process; a workload is trained by one thread


@contextlib.contextmanager
def called(name: str) -> Iterator[Call]:
    """In this context a method of a workload runs."""
    global _now
    before, _now = _now, Call(name)
    try:
        yield _now
    finally:
        _now = before


@contextlib.contextmanager
def watched(
    say: Callable[[str], None], budget: float | None = None, give_up: Callable[[str], None] | None = None
) -> Iterator[None]:
    """In this context calls that do not return are told of; and ended once the time is up.

    Args:
        say: called from another thread with a sentence.
        budget: seconds from now, after which a call of the main thread that still does not return is interrupted; it
            becomes an error of the workload. None: none is.
        give_up: called from another thread with a sentence where that had no effect several times: the call swallows
            what is raised in it, or stands in C code that does not look.
    """
    over = threading.Event()
    begun = time.perf_counter()

    def look() -> None:
        while not over.wait(_LOOK):
            if (call := _now) is None:
                continue
            now = time.perf_counter()
            if now - call.since >= TOLD and not call.told:
                call.told = True
                say(f"{call.name} has not returned for {TOLD:.0f} s; it stands {where(call.thread)}")
            if budget is not None and now - begun >= budget + grace(budget) and now - call.since >= grace(budget):
                if call.tries >= _TRIES and now - call.tried >= _AGAIN and give_up is not None:
                    give_up(f"{call.name} {call.ended}, and it can't be interrupted")
                    return
                _end(call, budget, now)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def grace(budget: float) -> float:
    """Seconds past a budget that a call may take: the last step may have been a long one."""
    return max(1.0, min(10.0, budget / 4))


def where(thread: int) -> str:
    """The innermost line of a thread that is neither pybatch's nor a library's: "at mine.py, line 12: `x = get()`"."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "in a library"


def told(error: BaseException) -> str:
    """An error in user code: its type, its text, and the innermost line of theirs that it passed."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(".")
    if isinstance(error, SyntaxError):
        return text if error.lineno is None or str(error).endswith(")") else f"{text}, line {error.lineno}"
    passed = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [(name, line) for name, line in passed if _is_users(name)]
    return f"{text}, {_place(*own[-1])}" if own else text


def _place(name: str, line: int) -> str:
    text = linecache.getline(name, line).strip()
    near = name
    with contextlib.suppress(OSError):  # the working directory may be gone
        near = os.path.relpath(name) if Path(name).is_relative_to(Path.cwd()) else name
    return f"at {near}, line {line}" + (f": `{text[:80]}`" if text else "")


def _is_users(name: str) -> bool:
    """Whether a file is neither pybatch's nor a library's."""
    path = Path(name)
    library = path.is_relative_to(_OWN) or any(path.is_relative_to(folder) for folder in _LIBRARIES)
    return not name.startswith("<") and not library


def _end(call: Call, budget: float, now: float) -> None:
    """Interrupt the call as Ctrl-C would, in the main thread; another thread's goes on."""
    if call.thread != threading.main_thread().ident or now - call.tried < _AGAIN:
        return
    call.tried, call.tries = now, call.tries + 1
    call.ended = (
        f"had not returned after {now - call.since:.0f} s when the time budget of {budget:g} s was over; it stood "
        f"{where(call.thread)}"
    )
    signal.pthread_kill(call.thread, signal.SIGINT)
