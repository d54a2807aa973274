"""Clocks that time steps of work: the wall clock on a CPU, device events on a GPU."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from pybatch.device.disturbance import WAITED, waited_s

Work = Callable[[], object]


class Clock(ABC):
    """Times calls of a piece of work. It knows nothing of when to stop: that is `capacity.stopping`."""

    host_bound_reason: str | None = None  # why `host_bound` gives no figure
    left_out = 0.0  # share of the calls of `undisturbed` that lost their core and were left out

    @abstractmethod
    def time(self, work: Work, count: int) -> list[float]:
        """Seconds of each of `count` successive calls."""

    def undisturbed(self, work: Work, count: int) -> list[float]:
        """As `time`, but of calls that had to wait for a core the time is left out where others had not to.

        Gives at least one time.
        """
        return self.time(work, count)

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

    def __init__(self) -> None:
        self._disturbed = False  # when it last looked
        self._calls = self._left = 0

    def time(self, work: Work, count: int) -> list[float]:
        """Seconds of each of `count` successive calls."""
        marks = [time.perf_counter()]
        for _ in range(count):
            work()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]

    def undisturbed(self, work: Work, count: int) -> list[float]:
        """As `time`, of calls during which no thread of this process waited for a core; of all where none was such.

        A call of a millisecond that loses its core takes ten. Waits are read around each call only while there are
        any: that takes longer than a short call, outside of what is timed.
        """
        self._calls += count
        self.left_out = self._left / self._calls
        if not self._disturbed:
            before = waited_s()
            seconds = self.time(work, count)
            after = waited_s()
            if before is None or after is None or _kept_core(sum(seconds), after - before):
                return seconds
        calls = [self._with_wait(work) for _ in range(count)]
        alone = [seconds for seconds, waited in calls if _kept_core(seconds, waited)]
        self._disturbed = len(alone) < count
        if not alone:
            return [seconds for seconds, _ in calls]
        self._left += count - len(alone)
        self.left_out = self._left / self._calls
        return alone

    def _with_wait(self, work: Work) -> tuple[float, float]:
        """Seconds of a call, and those that threads of this process waited for a core meanwhile."""
        before = waited_s() or 0.0
        (seconds,) = self.time(work, 1)
        return seconds, (waited_s() or 0.0) - before


def _kept_core(seconds: float, waited: float) -> bool:
    """Whether a thread waited for a core for no more than a small share of so many seconds, on average."""
    return waited <= WAITED * seconds * torch.get_num_threads()


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
