"""A few full training steps of one large batch in a fresh process, which may run out of memory."""

from __future__ import annotations

import queue
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pybatch.processes.child import Channel, Child

if TYPE_CHECKING:
    from pybatch.workloads.running.packing import Packed

_STEPS = 3


@dataclass(frozen=True)
class Request:
    """What to run, and within which limits."""

    workload: Packed
    device: str
    dtype: str
    seed: int
    batch: int
    small: int  # a batch that is known to run
    limit_bytes: int
    seconds: float  # stop after the step during which these end


@dataclass(frozen=True)
class Outcome:
    """How it went. `peak_bytes` is above what the process held before the session was made."""

    status: Literal["ok", "oom", "error", "timeout"]
    steps: int = 0
    peak_bytes: int | None = None
    step_s: list[float] = field(default_factory=list)
    reason: str | None = None


def run_probe(request: Request, timeout_s: float) -> Outcome:
    """Run a request in a fresh process; killed at the timeout."""
    end = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as complaints:
        child = Child(work, stderr=complaints)
        try:
            # A child that does not read lets the pipe fill up: sending must not outlast the timeout.
            threading.Thread(target=child.send, args=(request,), daemon=True).start()
            _, outcome = child.answers.get(timeout=max(0.0, end - time.monotonic()))
            status = child.status() if outcome is None else 0
        except queue.Empty:
            return Outcome("timeout", reason=f"stopped after {timeout_s:.3g} s")
        finally:
            child.stop()
        if isinstance(outcome, Outcome):
            return outcome
        if status == -signal.SIGKILL:
            return Outcome("oom", reason="killed by the system, as it does when memory runs out")
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
        return Outcome("error", reason=f"process ended with status {status}: {''.join(last)}")


def work(channel: Channel) -> None:
    """In the fresh process: run one request."""
    channel.send(run(channel.receive()))


def run(request: Request) -> Outcome:
    """Run the request in this process."""
    from pybatch.capacity.exploration import first_line
    from pybatch.workloads.running.session import is_out_of_memory

    done: list[float] = []
    peak: list[int | None] = [None]
    try:
        _steps(request, request.workload.open(), done, peak)
    except Exception as error:
        status: Literal["oom", "error"] = "oom" if is_out_of_memory(error) else "error"
        return Outcome(status, len(done), None, done, first_line(error))
    return Outcome("ok", len(done), peak[0], done)


def _steps(request: Request, workload: Any, done: list[float], peak: list[int | None]) -> None:
    import torch

    from pybatch.capacity.step import TrainingStep
    from pybatch.device.memory import PeakMemory
    from pybatch.workloads.running.session import Session

    device = torch.device(request.device)
    memory = PeakMemory(device)
    step = TrainingStep(Session(workload, device, request.dtype, request.seed))
    step.load(request.small)
    step()  # threads, their arenas and the optimizer's state exist before the limit is set
    step.check()
    step.clear()
    memory.rebase(step.held_bytes)
    _limit(device, request.limit_bytes)
    memory.start()
    began = time.perf_counter()
    step.load(request.batch)
    while len(done) < _STEPS and (not done or time.perf_counter() - began + done[-1] < request.seconds):
        before = time.perf_counter()
        step()
        step.check()
        done.append(time.perf_counter() - before)
    if device.type == "cuda" and torch.cuda.memory_stats(device).get("num_alloc_retries", 0):
        raise MemoryError("the allocator had to free its cache and retry: too close to the limit to be fast")
    peak[0] = memory.peak()


def _limit(device: Any, limit: int) -> None:
    """Make an overshoot an error in this process, instead of a machine out of memory."""
    import torch

    from pybatch.device.memory import process_bytes

    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return
    import resource

    size, resident = process_bytes("VmSize"), process_bytes("VmRSS")
    if size is not None and resident is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
