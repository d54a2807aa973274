"""Workers that train tasks of trials: this process, or processes of this machine. One writer: outcomes come back.

A worker that is lost (killed, out of memory) loses the trials it had not sent back; they are run again by a new one.
"""

from __future__ import annotations

import dataclasses
import queue
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pybatch.base.errors import PybatchError, StoreError, WorkloadError
from pybatch.device.memory import keep_freed
from pybatch.processes.child import Channel, Child
from pybatch.training.task import run_task
from pybatch.training.trial import Outcome, Task
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.calls import watched
from pybatch.workloads.running.packing import Packed, pack
from pybatch.workloads.running.session import is_out_of_memory

_NO_MEMORY = "its trials may need more memory than there is: use fewer jobs, or leave this batch size out"
TRIES = 3  # times a task is begun: a trial that kills its worker each time would never end

Deliver = Callable[[Outcome], None]


class LostWorkerError(PybatchError, RuntimeError):
    """A task's worker was lost TRIES times; `submission` is the task's."""

    def __init__(self, submission: Submission) -> None:
        super().__init__(f"the worker was lost {TRIES} times in the same trials ({submission.lost})")
        self.submission = submission


@dataclass(frozen=True)
class Ending:
    """How a task ended; all None: every trial was run."""

    note: str | None = None  # why its trials were not stacked
    failed: str | None = None  # why the rest of them could not be trained
    error: str | None = None  # what is wrong with the workload
    begun: bool = False  # and whether it had been trained until then


@dataclass
class Submission:
    """A task that was handed in, and what came back of it."""

    task: Task
    ending: Ending | None = None  # None: not yet
    tries: int = 0
    delivered: set[str] = field(default_factory=set)
    lost: str = _NO_MEMORY  # how the worker of the last try ended, and what to do

    def rest(self) -> Task:
        """The task without what came back."""
        trials = tuple(t for t in self.task.trials if t.key not in self.delivered)
        return dataclasses.replace(self.task, trials=trials)

    def begin(self) -> None:
        """Count a try; raises LostWorkerError after the last."""
        self.tries += 1
        if self.tries > TRIES:
            raise LostWorkerError(self)


class Workers(ABC):
    """Where tasks are trained. `deliver` is called in this process, from within `wait`, with every outcome.

    A context manager: leaving it stops what runs.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, task: Task) -> Submission:
        """Hand in a task."""

    @abstractmethod
    def wait(self) -> Submission:
        """The next finished task, after all of its outcomes were delivered."""

    @abstractmethod
    def close(self) -> None:
        """Stop what runs and free what is held. Safe to call twice."""

    @property
    def width(self) -> int:
        """Tasks that run at the same time."""
        return 1

    def deliver(self, submission: Submission, outcome: Outcome) -> None:
        """Pass an outcome on, once."""
        if outcome.trial.key not in submission.delivered:
            submission.delivered.add(outcome.trial.key)
            self._deliver(outcome)


def train(
    workload: Workload, task: Task, deliver: Deliver, device: torch.device, progress: Progress | None = None
) -> Ending:
    """`run_task`, with what can go wrong in a workload told apart from faults of pybatch, which are raised."""
    try:
        return Ending(run_task(workload, task, deliver, device=device, progress=progress))
    except StoreError:  # of `deliver`: no fault of the workload
        raise
    except PybatchError as error:
        return Ending(error=str(error), begun=isinstance(error, WorkloadError) and error.begun)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Ending(failed="memory ran out")


class Inline(Workers):
    """Tasks trained in this process, one after another."""

    def __init__(
        self, workload: Workload, deliver: Deliver, device: torch.device, progress: Progress | None = None
    ) -> None:
        super().__init__(deliver)
        self.workload, self.device, self.progress = workload, device, progress
        self.waiting: deque[Submission] = deque()

    def submit(self, task: Task) -> Submission:
        """As `Workers.submit`."""
        self.waiting.append(Submission(task))
        return self.waiting[-1]

    def wait(self) -> Submission:
        """As `Workers.wait`."""
        submission = self.waiting.popleft()
        submission.ending = train(
            self.workload,
            submission.task,
            lambda outcome: self.deliver(submission, outcome),
            self.device,
            self.progress,
        )
        return submission

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
    """Tasks trained by processes of this machine, the threads of torch divided among them."""

    def __init__(self, workload: Workload, deliver: Deliver, device: torch.device, jobs: int) -> None:
        super().__init__(deliver)
        self.jobs = jobs
        threads = max(1, torch.get_num_threads() // jobs)
        self._setup = Setup(pack(workload), str(device), threads)
        self._answers: queue.SimpleQueue[tuple[Child, Any]] = queue.SimpleQueue()
        self._idle: list[Child] = []
        self._busy: dict[Child, Submission] = {}
        self._waiting: deque[Submission] = deque()

    @property
    def width(self) -> int:
        """As `Workers.width`."""
        return self.jobs

    def submit(self, task: Task) -> Submission:
        """As `Workers.submit`."""
        submission = Submission(task)
        self._waiting.append(submission)
        self._fill()
        return submission

    def wait(self) -> Submission:
        """As `Workers.wait`."""
        while True:
            child, answer = self._answers.get()
            if child not in self._busy:
                continue  # the end of one that was idle
            submission = self._busy[child]
            if isinstance(answer, Outcome):
                self.deliver(submission, answer)
                continue
            del self._busy[child]
            if answer is None:
                submission.lost = _ending(child.status())
                child.stop()
                self._waiting.appendleft(submission)
            else:
                self._idle.append(child)
            self._fill()
            if answer is not None:
                submission.ending = answer
                return submission

    def close(self) -> None:
        """As `Workers.close`."""
        for child in [*self._idle, *self._busy]:
            child.stop()
        self._idle, self._busy = [], {}
        self._waiting.clear()

    def _fill(self) -> None:
        while self._waiting and len(self._busy) < self.jobs:
            submission = self._waiting.popleft()
            submission.begin()
            child = self._idle.pop() if self._idle else self._started()
            self._busy[child] = submission
            child.send(submission.rest())

    def _started(self) -> Child:
        child = Child(work, self._answers)
        child.send(self._setup)
        return child


def work(channel: Channel) -> None:
    """In a worker process: read the setup, then train tasks until nothing more is asked."""
    setup: Setup = channel.receive()
    torch.set_num_threads(setup.threads)
    keep_freed()
    workload, device = setup.workload.open(), torch.device(setup.device)
    torch.set_num_threads(setup.threads)  # its share of what the workload may have asked for anew
    with watched(lambda text: print(f"pybatch: {text}", file=sys.stderr)):
        while True:
            task = channel.receive()
            channel.send(train(workload, task, channel.send, device))


def _ending(status: int | None) -> str:
    """How a process ended that answers no more, by its exit status, and what to do about it."""
    if status is None:
        return "it answers no more: see what it wrote above"
    if status == -signal.SIGKILL:
        return f"killed by SIGKILL, as where memory runs out; {_NO_MEMORY}"
    names = {number.value: number.name for number in signal.Signals}  # real-time signals have none
    how = f"ended by {names.get(-status, f'signal {-status}')}" if status < 0 else f"ended with exit status {status}"
    return f"{how}: see what it wrote above, and what in the workload ends a process"
