"""Workers that train units of trials: this process, or processes of this machine. One writer: outcomes come back.

A worker that is lost (killed, out of memory) loses the trials it had not sent back; they are run again by a new one.
"""

from __future__ import annotations

import dataclasses
import queue
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pybatch.base.errors import PybatchError, StoreError
from pybatch.device.memory import keep_freed
from pybatch.processes.child import Channel, Child
from pybatch.training.trial import Outcome, Unit
from pybatch.training.unit import run_unit
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.packing import Packed, pack
from pybatch.workloads.running.session import is_out_of_memory

_NO_MEMORY = "its trials may need more memory than there is: use fewer jobs, or leave this batch size out"
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
        self._setup = Setup(pack(workload), str(device), threads)
        self._answers: queue.SimpleQueue[tuple[Child, Any]] = queue.SimpleQueue()
        self._idle: list[Child] = []
        self._busy: dict[Child, Ticket] = {}
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
                ticket.lost = _ending(child.status())
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
            child = self._idle.pop() if self._idle else self._started()
            self._busy[child] = ticket
            child.send(ticket.rest())

    def _started(self) -> Child:
        child = Child(work, self._answers)
        child.send(self._setup)
        return child


def work(channel: Channel) -> None:
    """In a worker process: read the setup, then train units until nothing more is asked."""
    setup: Setup = channel.receive()
    torch.set_num_threads(setup.threads)
    keep_freed()
    workload, device = setup.workload.open(), torch.device(setup.device)
    while True:
        unit = channel.receive()
        channel.send(train(workload, unit, channel.send, device, lambda text, share: channel.check_parent()))


def _ending(status: int | None) -> str:
    """How a process ended that answers no more, by its exit status, and what to do about it."""
    if status is None:
        return "it answers no more: see what it wrote above"
    if status == -signal.SIGKILL:
        return f"killed by SIGKILL, as where memory runs out; {_NO_MEMORY}"
    names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
    how = f"ended by {names.get(-status, f'signal {-status}')}" if status < 0 else f"ended with exit status {status}"
    return f"{how}: see what it wrote above, and what in the workload ends a process"
