"""Workers that train units of trials: this process, or processes of this machine. One writer: outcomes come back.

A worker that is lost (killed, out of memory) loses the trials it had not sent back; they are run again by a new one.
"""

from __future__ import annotations

import dataclasses
import pickle
import queue
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pybatch.base.errors import PybatchError, StoreError
from pybatch.training.trial import Outcome, Unit
from pybatch.training.unit import run_unit
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.packing import Packed, pack
from pybatch.workloads.running.session import is_out_of_memory

_NO_MEMORY = "its trials may need more memory than there is: use fewer jobs, or leave this batch size out"
_ENDS = 5.0  # s in which a process that closed its answers ends
TRIES = 3  # times a unit is begun: a trial that kills its worker each time would never end

Deliver = Callable[[Outcome], None]


class LostWorkerError(PybatchError, RuntimeError):
    """A unit's worker was lost TRIES times; `ticket` is the unit's."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(f"the worker was lost {TRIES} times in the same trials ({ticket.lost})")
        self.ticket = ticket


@dataclass
class Ticket:
    """A unit under way, and what came back of it."""

    unit: Unit
    note: str | None = None  # as in `Done`
    failed: str | None = None  # as in `Done`
    error: str | None = None  # as in `Done`
    tries: int = 0
    delivered: set[str] = field(default_factory=set)
    lost: str = _NO_MEMORY  # how the worker of the last try ended, and what to do

    def rest(self) -> Unit:
        """The unit without what came back."""
        trials = tuple(t for t in self.unit.trials if t.key not in self.delivered)
        return dataclasses.replace(self.unit, trials=trials)

    def begin(self) -> None:
        """Count a try; raises LostWorkerError after the last."""
        self.tries += 1
        if self.tries > TRIES:
            raise LostWorkerError(self)


class Workers(ABC):
    """Where units are trained. `deliver` is called in this process, from within `wait`, with every outcome.

    A context manager: leaving it stops what runs.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, unit: Unit) -> Ticket:
        """Hand in a unit."""

    @abstractmethod
    def wait(self) -> Ticket:
        """The next finished unit, after all of its outcomes were delivered."""

    @abstractmethod
    def close(self) -> None:
        """Stop what runs and free what is held. Safe to call twice."""

    @property
    def width(self) -> int:
        """Units that run at the same time."""
        return 1

    def deliver(self, ticket: Ticket, outcome: Outcome) -> None:
        """Pass an outcome on, once."""
        if outcome.trial.key not in ticket.delivered:
            ticket.delivered.add(outcome.trial.key)
            self._deliver(outcome)

    def finish(self, ticket: Ticket, done: Done) -> Ticket:
        """A ticket with its end written in."""
        ticket.note, ticket.failed, ticket.error = done.note, done.failed, done.error
        return ticket


@dataclass(frozen=True)
class Done:
    """A unit's end."""

    note: str | None = None  # why its trials were not stacked
    failed: str | None = None  # why the rest of them could not be trained
    error: str | None = None  # what is wrong with the workload


def train(
    workload: Workload, unit: Unit, deliver: Deliver, device: torch.device, progress: Progress | None = None
) -> Done:
    """`run_unit`, with what can go wrong in a workload told apart from faults of pybatch, which are raised."""
    try:
        return Done(run_unit(workload, unit, deliver, device=device, progress=progress))
    except StoreError:  # of `deliver`: no fault of the workload
        raise
    except PybatchError as error:
        return Done(error=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Done(failed="memory ran out")


class Inline(Workers):
    """Units trained in this process, one after another."""

    def __init__(
        self, workload: Workload, deliver: Deliver, device: torch.device, progress: Progress | None = None
    ) -> None:
        super().__init__(deliver)
        self.workload, self.device, self.progress = workload, device, progress
        self.waiting: deque[Ticket] = deque()

    def submit(self, unit: Unit) -> Ticket:
        """As `Workers.submit`."""
        self.waiting.append(Ticket(unit))
        return self.waiting[-1]

    def wait(self) -> Ticket:
        """As `Workers.wait`."""
        ticket = self.waiting.popleft()
        done = train(
            self.workload,
            ticket.unit,
            lambda outcome: self.deliver(ticket, outcome),
            self.device,
            self.progress,
        )
        return self.finish(ticket, done)

    def close(self) -> None:
        """As `Workers.close`."""
        self.waiting.clear()


@dataclass(frozen=True)
class Setup:
    """What a worker process is told first."""

    workload: Packed
    device: str
    threads: int


class Processes(Workers):
    """Units trained by processes of this machine, the threads of torch divided among them."""

    def __init__(self, workload: Workload, deliver: Deliver, device: torch.device, jobs: int) -> None:
        super().__init__(deliver)
        self.jobs = jobs
        threads = max(1, torch.get_num_threads() // jobs)
        self._setup = pickle.dumps(Setup(pack(workload), str(device), threads))
        self._answers: queue.SimpleQueue[tuple[_Child, Any]] = queue.SimpleQueue()
        self._idle: list[_Child] = []
        self._busy: dict[_Child, Ticket] = {}
        self._waiting: deque[Ticket] = deque()

    @property
    def width(self) -> int:
        """As `Workers.width`."""
        return self.jobs

    def submit(self, unit: Unit) -> Ticket:
        """As `Workers.submit`."""
        ticket = Ticket(unit)
        self._waiting.append(ticket)
        self._fill()
        return ticket

    def wait(self) -> Ticket:
        """As `Workers.wait`."""
        while True:
            child, answer = self._answers.get()
            if child not in self._busy:
                continue  # the end of one that was idle
            ticket = self._busy[child]
            if isinstance(answer, Outcome):
                self.deliver(ticket, answer)
                continue
            del self._busy[child]
            if answer is None:
                ticket.lost = child.ending()
                child.stop()
                self._waiting.appendleft(ticket)
            else:
                self._idle.append(child)
            self._fill()
            if answer is not None:
                return self.finish(ticket, answer)

    def close(self) -> None:
        """As `Workers.close`."""
        for child in [*self._idle, *self._busy]:
            child.stop()
        self._idle, self._busy = [], {}
        self._waiting.clear()

    def _fill(self) -> None:
        while self._waiting and len(self._busy) < self.jobs:
            ticket = self._waiting.popleft()
            ticket.begin()
            child = self._idle.pop() if self._idle else _Child(self._setup, self._answers)
            self._busy[child] = ticket
            child.send(ticket.rest())


class _Child:
    """A worker process, and a thread that reads its answers; None is put after the last one."""

    def __init__(self, setup: bytes, answers: queue.SimpleQueue[tuple[_Child, Any]]) -> None:
        self._answers = answers
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pybatch.processes.child"],  # -P: not a checkout that happens to be here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the driver's affair
        )
        self._write(setup)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, unit: Unit) -> None:
        self._write(pickle.dumps(unit))

    def ending(self) -> str:
        """How a process ended that answers no more, and what to do about it."""
        try:
            code = self.process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            return "it answers no more: see what it wrote above"
        if code == -signal.SIGKILL:
            return f"killed by SIGKILL, as where memory runs out; {_NO_MEMORY}"
        names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
        how = f"ended by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with exit status {code}"
        return f"{how}: see what it wrote above, and what in the workload ends a process"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was written to it last is lost with the process
                    continue

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except OSError:  # it died just now: the reader says so
            return

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self._answers.put((self, pickle.load(self.process.stdout)))
        except (EOFError, pickle.UnpicklingError, ValueError, OSError):  # it ended, perhaps within an answer
            self._answers.put((self, None))
