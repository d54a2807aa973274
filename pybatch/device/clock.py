"""Clocks that time steps of work: the wall clock on a CPU, device events on a GPU."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], object]


class Clock(ABC):
    """Times calls of a piece of work. It knows nothing of when to stop: that is `capacity.stopping`."""

    host_bound_reason: str | None = None  # why `host_bound` gives no figure

    @abstractmethod
    def time(self, work: Work, count: int) -> list[float]:
        """Seconds of each of `count` successive calls."""

    def host_bound(self, work: Work, step_s: float) -> float | None:
        """Share of a step of `step_s` seconds during which the device waits for the host, 0..1; None for the reason."""
        return None

    def now(self) -> float:
        """Seconds, for budgets."""
        return time.perf_counter()

    def rest(self, seconds: float) -> None:
        """Leave the device idle, so that it may cool and gather what power it may spend at once."""
        time.sleep(seconds)


class WallClock(Clock):
    """`time.perf_counter` around every call; right where work is done when the call returns."""

    host_bound_reason = "on a CPU the host is the device"

    def time(self, work: Work, count: int) -> list[float]:
        """Seconds of each of `count` successive calls."""
        marks = [time.perf_counter()]
        for _ in range(count):
            work()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]


class EventClock(Clock):
    """CUDA events recorded between the calls, and one synchronization at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, work: Work, count: int) -> list[float]:
        """Seconds of each of `count` successive calls, as the device saw them."""
        with torch.cuda.device(self.device):
            events = [_event() for _ in range(count + 1)]
            events[0].record()
            for event in events[1:]:
                work()
                event.record()
            torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def host_bound(self, work: Work, step_s: float) -> float | None:
        """1 - (device time of a step) / (step time).

        The device time is taken with the step enqueued while the device is held busy, so that it never waits for the
        host. A step that synchronizes inside hides part of its waiting: the share is then a lower bound.
        """
        alone = self.behind(work, min(1.0, max(4 * step_s, 1e-3)))
        return min(1.0, max(0.0, 1.0 - alone / step_s))

    def behind(self, work: Work, hold_s: float, before: Work | None = None) -> float:
        """Device seconds of a call enqueued while the device is held busy for about `hold_s`, and by `before`."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            begin, end = _event(), _event()
            torch.cuda._sleep(int(2e9 * hold_s))  # type: ignore[no-untyped-call]  # cycles at about 2 GHz
            if before is not None:
                before()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(self.device)
            return float(begin.elapsed_time(end)) / 1e3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return EventClock(device) if device.type == "cuda" else WallClock()
