"""Timing that the step benchmarks share: a cold cache before every sample, sides interleaved, intervals of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from pybatch.device.clock import EventClock

FLUSH_BYTES = 256 << 20  # several times any last-level cache met so far
# Of an array whose copy is a GPU's ceiling: a millisecond of work, as the large updates are. In a tenth of one, the
# start and the end weigh, and the ceiling would come out lower than what is held against it.
GPU_BYTES = 2 << 30


class Clock:
    """Seconds a call takes, with a cold cache, on either device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.randn(FLUSH_BYTES // 4, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        self.flush.add_(1.0)
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class DeviceClock(Clock):
    """Seconds a call takes on a GPU whose host is ahead, as behind a backward pass; cold cache.

    The call is enqueued while the device is held busy for `hold_s`, which should be longer than its launches take the
    host; one that waits for the device inside shows that wait.
    """

    def __init__(self, device: torch.device, hold_s: float = 2e-3) -> None:
        super().__init__(device)
        self.hold_s = hold_s

    def __call__(self, work: Callable[[], object]) -> float:
        def cold() -> None:
            self.flush.add_(1.0)

        return EventClock(self.device).behind(work, self.hold_s, before=cold)


def interleave(
    sides: Mapping[str, Callable[[], object]], prepare: Callable[[], object], clock: Clock, repeats: int
) -> dict[str, list[float]]:
    """Seconds per side; the order turns by one side every repeat. `prepare` runs untimed before each repeat."""
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        prepare()
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(clock(sides[name]))
    return times


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """median(theirs) / median(ours) and its 95 % bootstrap interval, resampling interleaved pairs."""
    pairs = np.array([ours, theirs])
    index = np.random.default_rng(0).integers(0, pairs.shape[1], (2000, pairs.shape[1]))
    medians = np.median(pairs[:, index], axis=2)
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return statistics.median(theirs) / statistics.median(ours), float(low), float(high)


def ceilings(clock: Clock, repeats: int) -> dict[str, float]:
    """Bytes read + written per second: of a copy, and of an update in place (no write-allocate traffic)."""
    size = GPU_BYTES if clock.device.type == "cuda" else FLUSH_BYTES
    source = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(source)
    works = {"copy": lambda: target.copy_(source), "in_place": lambda: target.add_(1.0)}
    times = interleave(works, lambda: None, clock, repeats)
    return {name: 2 * size / statistics.median(values) for name, values in times.items()}
