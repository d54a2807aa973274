"""What disturbs a measurement from outside: other processes, the hypervisor, and waiting for a core."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from pybatch.device.identity import usable_cores

# Shares from which step times are those of a disturbed machine: of the cores kept by others, of all time taken by the
# hypervisor, and of the time that this process wanted to run and waited.
OTHERS, STOLEN, WAITED = 0.1, 0.02, 0.05
_TASKS = Path("/proc/self/task")


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
        ran = waited = 0.0
        for task in _TASKS.glob("*/schedstat"):
            try:
                running, waiting, _ = task.read_text().split()
            except (OSError, ValueError):  # the thread has ended, or the kernel keeps no such record
                continue
            ran, waited = ran + int(running) / 1e9, waited + int(waiting) / 1e9
        return every - own.user - own.system, getattr(machine, "steal", 0.0), ran, waited
