"""The first steps after a rest, and steps until the device has settled: what comes later is sustained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pybatch.capacity.exploration import failed
from pybatch.device.clock import Clock, Work

BURST_STEPS = 100  # of a burst: what a GPU's clock holds before it warms up
_BURST_S = 0.5  # of long steps fewer
_LEAST_STEPS = 3
_REST_S = 1.0  # before a burst: power limits average over up to a second; a hot device needs longer to cool
_WARM_S = 2.0  # of work at least, before times count as sustained
_WINDOW_S = 0.25
_SETTLED = 0.01  # change of the median between windows


@dataclass
class Settling:
    """Bursts, then work until the clocks are warm, on a step that `load` readies for a batch size.

    `bursts` has the median step time, s, of the batch sizes that there was time for. Nothing here raises for what a
    batch size causes: the timing that follows meets it again and gives it its status.
    """

    load: Callable[[int], None]
    work: Work
    clock: Clock
    untimed: int = 1  # steps before timing, which allocate and load code
    bursts: dict[int, float] = field(default_factory=dict)
    settled: bool | None = None  # None: there was no time to warm up at all

    def measure(self, guesses: dict[int, float], deadline: float) -> None:
        """Bursts of the middle batch size and then of the largest ones, as many as fit before the deadline.

        Args:
            guesses: batch size -> expected seconds of a step.
            deadline: of the clock.
        """
        ascending = sorted(guesses)
        for n in dict.fromkeys([ascending[len(ascending) // 2], *reversed(ascending)]):
            count = _count(guesses[n])
            needed = _REST_S + guesses[n] * (self.untimed + count)
            if self.clock.now() + needed <= deadline:
                self._guarded(n, lambda n=n, count=count: self._burst(n, count))  # type: ignore[misc]

    def warm_up(self, guesses: dict[int, float], deadline: float) -> None:
        """Run the largest batch size until its step time has settled, or the deadline is near.

        The largest loads the device most. At least two seconds of work, then until the median of a quarter second of
        steps differs from the one before by 1 % at most.
        """
        fitting = [n for n, guess in guesses.items() if self.clock.now() + 2 * _LEAST_STEPS * guess <= deadline]
        if fitting:
            self._guarded(max(fitting), lambda: self._warm(max(fitting), guesses[max(fitting)], deadline))

    def _burst(self, n: int, count: int) -> None:
        self.load(n)
        self.clock.rest(_REST_S)
        self.clock.time(self.work, self.untimed)
        self.bursts[n] = float(np.median(self.clock.undisturbed(self.work, count)))

    def _warm(self, n: int, guess: float, deadline: float) -> None:
        self.load(n)
        self.settled, began, before = False, self.clock.now(), math.inf
        count = max(_LEAST_STEPS, math.ceil(_WINDOW_S / guess))
        while self.clock.now() + count * guess <= deadline:
            now = float(np.median(self.clock.undisturbed(self.work, count)))
            if self.clock.now() - began >= _WARM_S and abs(now / before - 1) <= _SETTLED:
                self.settled = True
                return
            before = now

    def _guarded(self, n: int, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            failed(error)  # raises what is neither the workload's nor memory's
            self.bursts.pop(n, None)


def _count(step_s: float) -> int:
    return min(BURST_STEPS, max(_LEAST_STEPS, int(_BURST_S / max(step_s, 1e-6))))
