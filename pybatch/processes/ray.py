"""Tasks of trials as tasks of a Ray cluster. The driver alone writes the store.

On a machine of one's own, `--ray auto` starts Ray; to use several machines, run `ray start --head` on one,
`ray start --address=HEAD:6379` on the others, and give `--ray HEAD:6379` or, on one of them, `--ray auto`.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch

from pybatch.base.errors import UsageError
from pybatch.device.memory import keep_freed
from pybatch.processes.workers import Deliver, Ending, Submission, Workers, train
from pybatch.training.trial import Outcome, Task
from pybatch.workloads.base import Workload
from pybatch.workloads.running.packing import Packed, pack

_LOOPBACK = "127.0.0.1"
ANSWER = 5.0  # s in which a machine of the cluster accepts a connection


def load_ray() -> Any:
    """The module; raises UsageError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed. Run: pip install 'pybatch[ray]'.") from None
    return ray


def stream(packed: Packed, task: Task, device: str) -> Iterator[Outcome | Ending]:
    """The task: outcomes as they are known, then the end."""
    answers: queue.SimpleQueue[Outcome | Ending | BaseException] = queue.SimpleQueue()

    def work() -> None:
        keep_freed()
        try:
            answers.put(train(packed.open(), task, answers.put, torch.device(device)))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        yield answer
        if isinstance(answer, Ending):
            return


class Cluster(Workers):
    """Tasks trained as Ray tasks, one core (or GPU) each.

    Args:
        address: "auto" for the cluster this machine belongs to, else one started here; or HOST:PORT.
    """

    def __init__(self, workload: Workload, deliver: Deliver, device: torch.device, address: str) -> None:
        super().__init__(deliver)
        self._ray = load_ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            self._join(address)
        resources = {"num_gpus": 1} if device.type == "cuda" else {"num_cpus": 1}
        options = {"num_returns": "streaming", "max_retries": 0, **resources}  # tries are counted by the submission
        self._task = self._ray.remote(stream).options(**options)
        self._packed, self._device = self._ray.put(pack(workload)), device.type
        self._running: dict[Any, Submission] = {}  # the tasks' streams

    @property
    def width(self) -> int:
        """As `Workers.width`."""
        kind = "GPU" if self._device == "cuda" else "CPU"
        return max(1, int(self._ray.cluster_resources().get(kind, 1)))

    def submit(self, task: Task) -> Submission:
        """As `Workers.submit`."""
        submission = Submission(task)
        self._begin(submission)
        return submission

    def wait(self) -> Submission:
        """As `Workers.wait`."""
        while True:
            [answers], _ = self._ray.wait(list(self._running), num_returns=1, fetch_local=False)
            submission = self._running[answers]
            try:
                answer = self._ray.get(next(answers))
            except (self._ray.exceptions.RayTaskError, StopIteration):
                raise  # the task's own exception, and an end without `Ending`: faults, not losses
            except self._ray.exceptions.RayError:
                del self._running[answers]
                self._begin(submission)
                continue
            if isinstance(answer, Outcome):
                self.deliver(submission, answer)
                continue
            del self._running[answers]
            submission.ending = answer
            return submission

    def close(self) -> None:
        """As `Workers.close`."""
        for answers in self._running:
            self._ray.cancel(answers, force=True)
        self._running = {}
        if self._started:
            self._ray.shutdown()

    def _begin(self, submission: Submission) -> None:
        submission.begin()
        self._running[self._task.remote(self._packed, submission.rest(), self._device)] = submission

    def _join(self, address: str) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if address != "auto":
            _check_reachable(address)
        try:
            if address == "auto":
                try:
                    self._ray.init(address="auto", **quiet)
                except ConnectionError:  # no cluster here: one of this machine's cores
                    self._ray.init(include_dashboard=False, _node_ip_address=_LOOPBACK, **quiet)  # nobody else joins
            else:
                self._ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if "Version mismatch" in str(error):
                found = " ".join(str(error).split())
                raise UsageError(
                    f"--ray {address!r}: the cluster runs other versions than this process ({found}). Install the same "
                    "Ray and Python on all of its machines."
                ) from None
            raise UsageError(
                f"--ray {address!r}: no cluster answers there ({error}). Give HOST:PORT of `ray start --head`, or auto."
            ) from None


def _check_reachable(address: str) -> None:
    """Raise UsageError where nothing listens at HOST:PORT. Ray itself tries again for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(f"--ray {address!r} is no address. Give HOST:PORT of `ray start --head`, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        cause = error.strerror or "no answer"
        raise UsageError(
            f"--ray {address!r}: no cluster answers there ({cause}). Give HOST:PORT of `ray start --head`, or auto."
        ) from None
