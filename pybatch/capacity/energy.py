"""Energy of a step, from one window of continuous steps for each of the batch sizes that matter most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pybatch.capacity.exploration import failed
from pybatch.device.clock import Clock, Work
from pybatch.device.counters import Counter

WINDOW_S = 5.0  # at least: the energy counter's update period (~100 ms) is then 2 % of the window
_LEAD_S = 0.5  # of the same steps before: counter and power lag behind the work, alike at both ends of the window then
_CHUNK_S = 0.5  # between looks at the clock, each of which lets the device wait for a moment
_SHARE = 0.3  # of the time for timing that windows may take from the rounds; they also get what the rounds leave
_KNEE = 0.95  # of the best throughput: from the smallest such batch on, the device is all but saturated


@dataclass(frozen=True)
class Energy:
    """What one window read."""

    joules: float
    steps: int
    seconds: float

    @property
    def per_step(self) -> float:
        """Joules."""
        return self.joules / self.steps


@dataclass
class EnergyWindows:
    """Windows of at least 5 s of continuous steps, the energy counter read at both ends of each.

    The counter is updated every 20 to 100 ms and lags behind the device, so that visits of a quarter second cannot be
    pieced together: each would end before the counter had seen its last steps, and begin with what came before it.

    Args:
        load: makes the work that follows a step of this batch size.
        work: one step.
        clock: times it.
        meter: gives `joules`, or a reason why not.
    """

    load: Callable[[int], None]
    work: Work
    clock: Clock
    meter: Counter

    def reserve_s(self, steps: dict[int, float], left: float) -> float:
        """Seconds to set aside of those left: whole windows, most important first; none where nothing can be read.

        Args:
            steps: batch size -> expected seconds of a step.
            left: seconds for the rounds and the windows together.
        """
        if "joules" in self.meter.reasons:
            return 0.0
        reserve = 0.0
        for n in in_order(steps):
            if reserve + needed_s(steps[n]) > _SHARE * left:
                break
            reserve += needed_s(steps[n])
        return reserve

    def measure(self, steps: dict[int, float], deadline: float) -> dict[int, Energy]:
        """Windows of as many batch sizes as fit before the deadline of the clock, most important first."""
        found: dict[int, Energy] = {}
        for n in in_order(steps):
            if "joules" in self.meter.reasons:
                break
            if self.clock.now() + needed_s(steps[n]) <= deadline:
                try:
                    energy = self._window(n, steps[n])
                except Exception as error:
                    failed(error)  # raises what is neither the workload's nor memory's; the times found before stand
                    continue
                if energy is not None:
                    found[n] = energy
        return found

    def _window(self, n: int, step_s: float) -> Energy | None:
        self.load(n)
        self.clock.time(self.work, _count(_LEAD_S, step_s))
        chunk, steps, seconds = _count(_CHUNK_S, step_s), 0, 0.0
        began = self.clock.now()
        self.meter.start()
        while seconds < WINDOW_S:
            steps += len(self.clock.time(self.work, chunk))
            seconds = self.clock.now() - began
        joules = self.meter.stop(seconds).get("joules")
        return None if joules is None else Energy(joules, steps, seconds)


def needed_s(step_s: float) -> float:
    """Seconds that a window takes, with the steps before it."""
    lead, chunk = (_count(seconds, step_s) * step_s for seconds in (_LEAD_S, _CHUNK_S))
    return lead + chunk * math.ceil(WINDOW_S / chunk)


def in_order(steps: dict[int, float]) -> list[int]:
    """Batch sizes by how much their energy matters: where throughput saturates, the largest, then the widest gaps."""
    if not steps:
        return []
    best = max(n / seconds for n, seconds in steps.items())
    found = [min(n for n, seconds in steps.items() if n / seconds >= _KNEE * best)]
    left = sorted(set(steps) - set(found), reverse=True)
    while left:
        chosen = left[0] if len(found) == 1 else max(left, key=lambda n: min(abs(math.log(n / m)) for m in found))
        left.remove(chosen)
        found.append(chosen)
    return found


def _count(seconds: float, step_s: float) -> int:
    return max(1, math.ceil(seconds / max(step_s, 1e-6)))
