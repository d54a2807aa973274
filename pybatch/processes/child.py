"""A process of pybatch's own that works for another: messages to its stdin, answers from its stdout, both pickled.

The parent makes a `Child` of a function that the other process can import; there it is called with a `Channel`. What
the workload prints in the child goes to stderr. Messages come from pybatch's own processes alone, never from a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

_ENDS = 5.0  # s for a process to end whose answers have ended
_LOOK = 1.0  # s between looks at whether the parent is there
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ParentGoneError(Exception):
    """Nothing more will be asked, and nobody waits for an answer."""


class Channel:
    """The child's side of it: what it is asked, and where its answers go."""

    def __init__(self) -> None:
        self._asked = sys.stdin.buffer
        self._answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # prints of the workload must not reach the answers

    def receive(self) -> Any:
        """The next message; raises ParentGoneError where the parent ended, perhaps within one."""
        try:
            return pickle.load(self._asked)
        except (EOFError, pickle.UnpicklingError):
            raise ParentGoneError from None

    def send(self, answer: Any) -> None:
        """Answer; raises ParentGoneError where nobody reads it."""
        try:
            self._answers.write(pickle.dumps(answer))
            self._answers.flush()
        except BrokenPipeError:
            raise ParentGoneError from None


Work = Callable[[Channel], None]


class Child:
    """A process that does `work`, which must be a function that can be imported, and a thread that reads its answers.

    Every answer is put into `answers` as (this child, answer), and (this child, None) after the last. Its complaints go
    to `stderr`; None: to this process's own.
    """

    def __init__(
        self, work: Work, answers: queue.SimpleQueue[tuple[Child, Any]] | None = None, stderr: IO[bytes] | None = None
    ) -> None:
        self.answers = answers if answers is not None else queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pybatch.processes.child"],  # -P: not a checkout that happens to be here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is the parent's affair, and so is the end of what the child starts
        )
        self._stopped = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(os.getpid())
        self.send(work)

    def send(self, message: Any) -> None:
        """Ask for something; where the child has ended, the reader says so."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(pickle.dumps(message))
            self.process.stdin.flush()

    def status(self) -> int | None:
        """Exit status of a process whose answers have ended, negative for a signal; None: it has not ended."""
        try:
            return self.process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it, with what it has started in its own group, and let go of its streams. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(_ENDS)  # a process that left the group may still hold the other end
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not (stream is self.process.stdout and self._reader.is_alive()):
                with contextlib.suppress(OSError):  # what was written to it last is lost with the process
                    stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self.answers.put((self, pickle.load(self.process.stdout)))
        except (EOFError, pickle.UnpicklingError, ValueError, OSError):  # it ended, perhaps within an answer
            pass
        except Exception:  # what it wrote is no answer
            traceback.print_exc()
        finally:
            self.answers.put((self, None))


def main() -> None:
    """Do what the parent asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel()
    with contextlib.suppress(ParentGoneError):
        _end_with(channel.receive())
        channel.receive()(channel)


def _end_with(parent: int) -> None:
    """End this process when its parent has gone, however that was killed and whatever is done here then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    main()
