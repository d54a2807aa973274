"""Time batch sizes in randomized rounds until each is steady or the time is up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pybatch.capacity.energy import Energy
from pybatch.capacity.exploration import failed
from pybatch.capacity.stopping import Median, StoppingRule, blocks, median
from pybatch.device.clock import Clock, Work
from pybatch.device.counters import Reading, Region
from pybatch.records import QUANTILES, Anchor, BatchStatus

_QUANTUM_S = 0.25  # of one visit: several visits spread a batch size's steps over the whole run
_CHUNK_S = 0.05  # between looks at the deadline, which a sudden disturbance must not carry far past
_LEAST_STEPS = 3  # per visit and per chunk
WARM_UP = {"cpu": 1, "cuda": 3}  # untimed steps of a visit


@dataclass
class Series:
    """Steps timed at one batch size."""

    batch: int
    guess_s: float  # step time expected, to plan the next visit
    seconds: list[float] = field(default_factory=list)
    spent_s: float = 0.0  # with steps that were left out
    errors: list[float] = field(default_factory=list)  # relative error of the median after each visit
    readings: list[Reading] = field(default_factory=list)
    host_bound: float | None = None
    eager_s: float | None = None  # median step time without the CUDA graphs that `seconds` are of
    stopped: str | None = None  # why it is done; None while it is not
    visits: list[tuple[int, int]] = field(default_factory=list)  # round, and steps timed in it
    energy: Energy | None = None
    failure: tuple[BatchStatus, str] | None = None  # a step raised: status and reason; there are no times then

    @property
    def median(self) -> Median:
        """Median step time with its interval."""
        return median(self.seconds)

    @property
    def blocks(self) -> list[float]:
        """Nearly independent step times, for a bootstrap."""
        return blocks(self.seconds)

    @property
    def block_rounds(self) -> list[int]:
        """The round that each block was timed in: that of its middle step."""
        of_steps = [turn for turn, count in self.visits for _ in range(count)]
        edges = np.linspace(0, len(of_steps), len(self.blocks) + 1)
        return [of_steps[int((a + b) / 2)] for a, b in itertools.pairwise(edges)]


def quantiles_ms(seconds: Sequence[float]) -> tuple[float, ...]:
    """Step times as a record keeps them: milliseconds at QUANTILES, empty without samples."""
    return tuple(float(1e3 * q) for q in np.quantile(seconds, QUANTILES)) if len(seconds) else ()


class Rounds:
    """Visits every batch size in random order, again and again, until the rule is met for each or the deadline is near.

    Interleaving makes a slow drift or a passing disturbance touch all batch sizes alike instead of bending the curve.
    An anchor batch is timed first and once more at the end: `anchor` has both, `drift` is the change between.

    Args:
        load: makes the work that follows a step of this batch size.
        work: one step.
        check: raises where the last step went wrong.
        clock, region: time and counters.
        rule: when a batch size is done.
        seed: of the order.
        eager: a step as it is before the first `work` that follows a `load`, to be timed beside it, or None.
    """

    def __init__(
        self,
        load: Callable[[int], None],
        work: Work,
        check: Callable[[], None],
        clock: Clock,
        region: Region,
        rule: StoppingRule,
        seed: int,
        eager: Work | None = None,
    ) -> None:
        self.load, self.work, self.check = load, work, check
        self.clock, self.region, self.rule, self.eager = clock, region, rule, eager
        self._order = np.random.default_rng(seed)
        self.series: dict[int, Series] = {}
        self.drift: float | None = None
        self.anchor: Anchor | None = None
        self.turn = 0  # of the rounds

    def run(
        self,
        guesses: dict[int, float],
        deadline: float,
        on_visit: Callable[[Series], None] = lambda series: None,
        first: int | None = None,
    ) -> None:
        """Time the batch sizes of `guesses` (batch -> expected seconds of a step) until `deadline` of the clock.

        The anchor is the batch size `first`, which is timed whatever the deadline, or where it is None the middle one.
        """
        self.series = {n: Series(n, guess) for n, guess in guesses.items()}
        anchor = self.series[sorted(guesses)[len(guesses) // 2] if first is None else first]
        reserve = self._visit_s(anchor)
        self._visit(anchor, deadline if first is None else math.inf)
        began = list(anchor.seconds)
        on_visit(anchor)
        while True:
            self.turn += 1
            order = self._order.permutation([n for n, series in self.series.items() if series.stopped is None])
            visited = False
            for n in order:
                if self._visit(self.series[int(n)], deadline - reserve):
                    visited = True
                    on_visit(self.series[int(n)])
            if not visited:
                break
        last = Series(anchor.batch, anchor.guess_s)
        if began and self._visit(last, deadline) and last.seconds:
            self.drift = last.median.value / median(began).value - 1
            self.anchor = Anchor(anchor.batch, quantiles_ms(began), quantiles_ms(last.seconds))

    def _visit_s(self, series: Series) -> float:
        return series.guess_s * (WARM_UP[self.region.device.type] + self._steps(series))

    def _steps(self, series: Series) -> int:
        return max(_LEAST_STEPS, math.ceil(_QUANTUM_S / max(series.guess_s, 1e-6)))

    def _visit(self, series: Series, deadline: float) -> bool:
        """Time some steps of a batch size; False where they do not fit before the deadline."""
        warm_up, count = WARM_UP[self.region.device.type], self._steps(series)
        if self.clock.now() + series.guess_s * (warm_up + count) > deadline:
            return False
        try:
            self._time(series, warm_up, count, deadline)
        except Exception as error:
            series.failure, series.stopped = failed(error), "failed"
            series.seconds.clear()
            series.visits.clear()
        return True

    def _time(self, series: Series, warm_up: int, count: int, deadline: float) -> None:
        self.load(series.batch)
        if self.eager is not None and series.eager_s is None:
            self.clock.time(self.eager, warm_up)
            series.eager_s = float(np.median(self.clock.undisturbed(self.eager, count)))
        self.clock.time(self.work, warm_up)
        chunk = max(_LEAST_STEPS, math.ceil(_CHUNK_S / max(series.guess_s, 1e-6)))
        end = min(deadline, self.clock.now() + 2 * max(_QUANTUM_S, _LEAST_STEPS * series.guess_s))
        seconds: list[float] = []
        began = self.clock.now()
        self.region.start()
        while len(seconds) < count and (not seconds or self.clock.now() < end):
            seconds += self.clock.undisturbed(self.work, min(chunk, count - len(seconds)))
            self.region.look()
        series.readings.append(self.region.stop())
        series.spent_s += self.clock.now() - began
        self.check()
        first = not series.seconds
        series.seconds += seconds
        series.visits.append((self.turn, len(seconds)))
        series.guess_s = float(np.median(series.seconds))
        if first:
            series.readings[-1] = self.region.estimated(series.readings[-1], self.work, series.guess_s)
        if series.host_bound is None:
            series.host_bound = self.clock.host_bound(self.work, series.guess_s)
        series.errors.append(series.median.relative_error)
        series.stopped = self.rule.met(len(series.seconds), series.spent_s, series.errors)


def unfinished(series: Sequence[Series]) -> list[int]:
    """Batch sizes that were timed but not until the rule was met."""
    return sorted(s.batch for s in series if s.seconds and s.stopped is None)
