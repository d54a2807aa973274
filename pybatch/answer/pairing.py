"""Statistics of a few seeds: runs of one seed side by side, trends by seed, and how many seeds stand behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from pybatch.base import numerals as n
from pybatch.records import ConvergencePoint

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval; ends are infinite where nothing bounds them, as of one seed."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def ratio(self) -> Estimate:
        """Of a logarithm: the ratio."""
        low, high = math.exp(self.low), math.exp(self.high) if self.high < 700 else math.inf
        return Estimate(math.exp(self.value), low, high, self.seeds)

    def words(self, signed: bool = False) -> str:
        """The value and its interval: 1.41 [1.38 to 1.45]."""
        sign = "+" if signed and self.value > 0 else ""
        return f"{sign}{n.number(self.value)} {self.span}"

    @property
    def span(self) -> str:
        """The interval alone."""
        return n.interval(self.low, self.high) if math.isfinite(self.high) else "(one seed: no interval)"


def mean_of(values: Sequence[float], error: float = 0.0, level: float = LEVEL) -> Estimate:
    """The mean over seeds with its interval by Student's t.

    Args:
        values: one a seed.
        error: how coarsely they are known, added to both sides: equal values of coarse figures are no exact ones.
        level: of the interval.
    """
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf, count)
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    half = _student(count - 1, level) * math.sqrt(variance / count) + error
    return Estimate(mean, mean - half, mean + half, count)


def difference_of(these: Sequence[float], those: Sequence[float], error: float, level: float = LEVEL) -> Estimate:
    """The mean of `these` less that of `those`, against the spread of both from seed to seed (Student's two samples).

    Two sets of runs by one rule differ by as much, so what lies past its interval is more than another draw.
    """
    counts = len(these), len(those)
    means = [sum(values) / len(values) for values in (these, those)]
    mean, free = means[0] - means[1], sum(counts) - 2
    if min(counts) < 2:
        return Estimate(mean, -math.inf, math.inf, min(counts))
    within = sum((v - middle) ** 2 for values, middle in zip((these, those), means, strict=True) for v in values)
    half = _student(free, level) * math.sqrt(within / free * sum(1 / count for count in counts)) + error
    return Estimate(mean, mean - half, mean + half, min(counts))


def fewer_reach(tables: Sequence[tuple[int, int, int, int]]) -> float:
    """The chance that as few or fewer of one rule's runs reach, were both as likely to: exact, over batch sizes.

    Conditional on how many of both reach at each batch size (the exact form of Cochran and Mantel-Haenszel's test).

    Args:
        tables: a batch size each: runs that reached and all runs, of the one rule and of the other.
    """
    chances, seen = [1.0], 0
    for reached, runs, others, other_runs in tables:
        whole, ways = reached + others, math.comb(runs + other_runs, reached + others)
        here = [
            math.comb(runs, k) * math.comb(other_runs, whole - k) / ways if k <= whole else 0.0 for k in range(runs + 1)
        ]
        both = [0.0] * (len(chances) + runs)
        for i, before in enumerate(chances):
            for j, chance in enumerate(here):
                both[i + j] += before * chance
        chances, seen = both, seen + reached
    return min(1.0, sum(chances[: seen + 1]))


@dataclass(frozen=True)
class Trend:
    """A straight line through the values of one seed against log2 of the batch size."""

    slope: float  # a doubling
    error: float  # of the slope, by how coarsely the values are known


def trend(values: Mapping[int, float], errors: Mapping[int, float] | None = None) -> Trend:
    """Least squares over the batch sizes of one seed, of which there are two or more."""
    logs = {batch: math.log2(batch) for batch in values}
    middle = sum(logs.values()) / len(logs)
    spread = sum((x - middle) ** 2 for x in logs.values())
    weights = {batch: (x - middle) / spread for batch, x in logs.items()}
    error = sum(abs(weights[batch]) * errors[batch] for batch in values) if errors is not None else 0.0
    return Trend(sum(weights[batch] * value for batch, value in values.items()), error)


def trend_of(trends: Sequence[Trend]) -> Estimate:
    """The mean slope over seeds."""
    return mean_of([t.slope for t in trends], sum(t.error for t in trends) / len(trends))


def steps_by_seed(p: ConvergencePoint) -> tuple[float | None, ...] | None:
    """Steps by seed at the rate that was chosen, None where a seed did not reach; None where no record says."""
    rate = next((rate for rate in p.rates if rate.learning_rate == p.learning_rate), None)
    return None if rate is None else rate.steps


def ran_by_seed(p: ConvergencePoint) -> set[int]:
    """Places of the seeds that were run at the rate that was chosen."""
    rate = next((rate for rate in p.rates if rate.learning_rate == p.learning_rate), None)
    return set() if rate is None else {i for i, status in enumerate(rate.statuses) if status != "not_run"}


def logs_of(p: ConvergencePoint) -> list[float]:
    """Logarithms of the steps of the seeds that reached."""
    return [math.log(steps) for steps in steps_by_seed(p) or () if steps]


def coarseness(steps: float) -> float:
    """By how much the logarithm of a number of steps is off at most, as steps are whole."""
    return math.log1p(1 / steps)


def counts(p: ConvergencePoint) -> tuple[int, int]:
    """Seeds that reached the target, and those that ran."""
    rate = next((rate for rate in p.rates if rate.learning_rate == p.learning_rate), None)
    if rate is None:
        return p.reached, p.runs
    return rate.statuses.count("reached"), sum(status != "not_run" for status in rate.statuses)


def shortfall(points: Sequence[ConvergencePoint], who: str = "") -> str:
    """What to add to a sentence where seeds did not reach: "; reached by 2 of 3 at 512; 0 of 3 at 1,024"."""
    found: dict[tuple[int, int], list[str]] = {}
    for p in sorted(points, key=lambda p: p.batch):
        reached, ran = counts(p)
        if reached < ran:
            found.setdefault((reached, ran), []).append(n.count(p.batch))
    parts = [f"{reached} of {ran} at {', '.join(batches)}" for (reached, ran), batches in found.items()]
    return f"; {who}reached by {'; '.join(parts)}" if parts else ""


def _student(free: int, level: float) -> float:
    return float(stdtrit(free, 0.5 + level / 2))
