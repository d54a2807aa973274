"""What disturbs a measurement from outside: other processes, the hypervisor, and waiting for a core.

Threads that wait for each other at the end of every operation take a hundred times as long where one of them must wait
for its core: on a machine that others use there are no more of them than cores are left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch

from pybatch.device.identity import usable_cores

# Shares from which step times are those of a disturbed machine: of the cores kept by others, of all time taken by the
# hypervisor, and of the time that this process wanted to run and waited.
OTHERS, STOLEN, WAITED = 0.1, 0.02, 0.05
_TASKS = Path("/proc/self/task")
_LOOK_S, _LOOKS = 0.25, 2  # at rest, to see what others do; the counters count hundredths
_looked: ContextVar[str | None] = ContextVar("looked", default=None)  # what the context around this one did, or ""


class Disturbance:
    """What happened on the host since this object was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began, self._before = time.perf_counter(), self._seconds()

    def told(self) -> tuple[str, ...]:
        """What disturbed, with its figures; empty where nothing did."""
        found, cores = [], usable_cores()
        others, stolen, waited = self.figures()
        if others is not None and others > OTHERS * cores:
            found.append(f"other processes kept {others:.1f} of {cores} cores busy")
        if stolen is not None and stolen > STOLEN:
            found.append(f"the hypervisor took {stolen:.0%} of the time")
        if waited is not None and waited > WAITED:
            found.append(f"this process waited for a core {waited:.0%} of the time")
        return tuple(found)

    def figures(self) -> tuple[float | None, float | None, float | None]:
        """Cores kept by others, share of time stolen, share of this process's time spent waiting for a core.

        None where it can't be read: the first two where this process cannot use the whole machine, whose counters then
        include cores that do not concern it; the last one without Linux's schedstat.
        """
        seconds = time.perf_counter() - self._began
        others, stolen, ran, waited = (
            after - before for after, before in zip(self._seconds(), self._before, strict=True)
        )
        whole = usable_cores() == psutil.cpu_count() and seconds > 0
        readable = _TASKS.is_dir() and ran > 0
        return (
            max(0.0, others / seconds) if whole else None,
            max(0.0, stolen / (seconds * usable_cores())) if whole else None,
            max(0.0, waited / (ran + waited)) if readable else None,
        )

    def _seconds(self) -> tuple[float, float, float, float]:
        """Of others, of the hypervisor, and of this process's threads: run, and waited to run."""
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        every = machine.user + machine.system + getattr(machine, "nice", 0.0)
        ran, waited = _scheduled()
        return every - own.user - own.system, getattr(machine, "steal", 0.0), ran, waited


def waited_s() -> float | None:
    """Seconds that this process's threads together have waited for a core; None without Linux's schedstat."""
    ran, waited = _scheduled()
    return waited if ran > 0 else None


@contextmanager
def threads_left(device: torch.device, earlier: int | None = None) -> Iterator[str | None]:
    """In this context torch takes no more threads than other processes leave cores; gives what was done, or None.

    Threads that the user has asked for by OMP_NUM_THREADS stay. Contexts within one another look at others once.

    Args:
        device: nothing is done where it is no CPU.
        earlier: threads of a run that goes on, which are taken without a look.
    """
    if _looked.get() is not None:
        yield _looked.get() or None
        return
    before = torch.get_num_threads()
    left, said = before, ""
    if device.type == "cpu" and before > 1 and "OMP_NUM_THREADS" not in os.environ:
        if earlier is not None:
            left, said = earlier, f"{earlier} of {before} threads were used, as in the run that goes on"
        elif (others := _busy()) is not None and round(others) > 0:
            cores = usable_cores()
            left = max(1, cores - round(others))
            said = (
                f"other processes kept {others:.1f} of {cores} cores busy, so that {left} of {before} threads were used"
            )
    said = said if left < before else ""
    token = _looked.set(said)
    try:
        if said:
            torch.set_num_threads(left)
        yield said or None
    finally:
        _looked.reset(token)
        if said:
            torch.set_num_threads(before)


def _busy() -> float | None:
    """Cores that others keep busy, the lesser of two looks: a passing one must not count; None where it can't be read.

    Processes that are nice would yield them.
    """
    found = []
    for _ in range(_LOOKS):
        if usable_cores() != psutil.cpu_count():
            return None
        seen, nice = Disturbance(), getattr(psutil.cpu_times(), "nice", 0.0)
        began = time.perf_counter()
        time.sleep(_LOOK_S)
        others = seen.figures()[0]
        if others is None:
            return None
        yielding = (getattr(psutil.cpu_times(), "nice", 0.0) - nice) / max(time.perf_counter() - began, 1e-9)
        found.append(max(0.0, others - yielding))
        if round(found[-1]) == 0:
            break
    return min(found)


def _scheduled() -> tuple[float, float]:
    """Seconds that this process's threads have run, and waited to run; zeros without Linux's schedstat."""
    ran = waited = 0.0
    for task in _TASKS.glob("*/schedstat"):
        try:
            running, waiting, _ = map(int, task.read_text().split())
        except (OSError, ValueError):  # the thread has ended, or the kernel keeps no such record
            continue
        ran, waited = ran + running / 1e9, waited + waiting / 1e9
    return ran, waited
