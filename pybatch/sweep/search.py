"""Which trials to run at a batch size: a log grid of rates that grows past its edges, a race over it, or Optuna.

In a race the first seed tries the rates, and the other seeds run only those that can still have the least median. A
rate that is behind is given up: by one seed as soon as another has reached, as it cannot be first any more; by several
when it has taken SURE times the least median. The rate chosen is that of the whole grid unless a rate's first seed is
SURE times slower than the best median while the rate's own median is the best.

Where the best rate of another batch size is known, a race begins near the rate that follows from it; elsewhere, with
one seed, with every second rate, and those between are tried beside the best alone. The grid grows from there as it
does past its edges, so that steps that fall and then rise with the rate have the same best one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pybatch.base.errors import UsageError, unknown
from pybatch.training.trajectory import lowest
from pybatch.training.trial import SLACK, Study, rounded
from pybatch.workloads.running.choice import is_own

RATES = 12  # of the first grid, a factor of 2 apart: 2000-fold from the lowest to the highest
EXTENSIONS = 4  # of two rates each, past an edge at which the best rate lies
ASKED = 4  # rates asked of a sampler at a time: they are trained together
REACH = 1.35  # times the first seed's best: rates that all seeds run at once, as the least median is not known yet
SURE = 1.2  # times the least median: a rate whose first seed takes longer is out; seeds differ by some 5 to 10 %
FIRST = 1.0  # times the only seed's best: whoever has not reached by then is not the best
NEAR = 4.0  # times an expected rate, up and down: rates that a race tries there first
FEW = 3  # rates that a search begins with at least
_SAME = 1e-4  # relative: rates that differ by rounding only
GRIDS = ("race", "grid")
SAMPLERS = {"tpe": "TPESampler", "qmc": "QMCSampler", "random": "RandomSampler", "cmaes": "CmaEsSampler"}


@dataclass(frozen=True)
class Proposal:
    """What a search asks for next: runs to make together, and when a rate ends slower ones."""

    runs: tuple[tuple[float, int], ...]  # (rate, seed)
    seeds: tuple[int, ...]  # over whose median a rate ends slower ones
    margin: float = SLACK  # times that median, after which they end


class Search(ABC):
    """The trials of one study, asked for in turns."""

    @abstractmethod
    def next_rates(self, study: Study) -> list[float]:
        """The next rates to try, given all outcomes so far; empty when the search is over."""

    def propose(self, study: Study) -> Proposal | None:
        """The next trials, given all outcomes so far, every rate with every seed; None when the search is over."""
        seeds = tuple(study.seeds)
        return _proposal([(rate, seed) for rate in self.next_rates(study) for seed in seeds], seeds)


def _proposal(runs: Sequence[tuple[float, int]], seeds: tuple[int, ...], margin: float = SLACK) -> Proposal | None:
    return Proposal(tuple(dict.fromkeys(runs)), seeds, margin) if runs else None


def best_rate(study: Study, split: str, rates: Sequence[float]) -> float | None:
    """The rate of the fewest median steps, the lowest of equals; None where none reached the target.

    Of an even number of seeds, a rate that half of them reach is taken where no rate is reached by more.
    """
    best = min(sorted(rates), key=lambda lr: study.rank(split, lr), default=None)
    return best if best is not None and math.isfinite(study.median(split, best)) else None


def nearest_rate(study: Study, split: str, rates: Sequence[float]) -> float | None:
    """The best rate; where none reached the target, the one whose loss came lowest, by the median of the seeds that ran
    it: the middle one of equals, and the lowest where every one diverged. None where none has run."""
    best = best_rate(study, split, rates)
    if best is not None:
        return best
    lows: dict[float, list[float]] = {}
    for (lr, seed), outcome in study.ended.items():
        if lr in rates and seed in study.seeds:
            loss = math.inf if outcome.end == "diverged" else lowest(outcome.trajectory, split)[0]
            lows.setdefault(lr, []).append(loss if math.isfinite(loss) else math.inf)
    least = {lr: median(found) for lr, found in lows.items()}
    equals = sorted(lr for lr, loss in least.items() if loss == min(least.values()))
    if not equals or math.isinf(least[equals[0]]):
        return min(equals, default=None)
    return equals[len(equals) // 2]


def at_edge(study: Study, split: str, rates: Sequence[float]) -> bool:
    """Whether the best rate is the lowest or the highest one tried."""
    best = best_rate(study, split, rates)
    return best is not None and best in (min(rates), max(rates))


class Grid(Search):
    """A log grid; two rates more past an edge where the best lies there, then two rates halfway beside the best.

    Where no rate reaches the target, that of the lowest loss stands for the best at first: a grid that lies too low, or
    too high, is left, so that every batch size gets a search around its own best rate.

    Args:
        rates: the first ones.
        near: a rate that is expected to do well: of more than FEW `rates`, those within NEAR times it, or the FEW
            nearest, are the first.
        sparse: begin, where no such rate is known, with every second of at least 2 FEW `rates`; those next to the best
            are tried together with those halfway.
    """

    def __init__(self, rates: Sequence[float], near: float | None = None, *, sparse: bool = False) -> None:
        self.exact: dict[float, float] = {}  # by a rate as it is trained, rounded: what it is reckoned with
        self.rates = sorted(self._named(rates))
        first, last = self.exact[self.rates[0]], self.exact[self.rates[-1]]
        self.ratio = (last / first) ** (1 / (len(self.rates) - 1)) if len(self.rates) > 1 else 2.0
        if near is not None and len(self.rates) > FEW:
            self.rates = self._around(near)
        self.skipped: list[float] = []  # of `rates`
        if sparse and near is None and len(self.rates) >= 2 * FEW:
            self.skipped, self.rates = self.rates[::2], self.rates[1::2]
        self.tried: list[float] = []
        self.extensions = {False: 0, True: 0}  # towards a rate that reaches, and past an edge that did
        self.refined: dict[str, int] = {}  # how often, by split

    def next_rates(self, study: Study) -> list[float]:
        """As `Search.next_rates`."""
        return self.outward(study) or self.halfway(study)

    def outward(self, study: Study) -> list[float]:
        """The first grid; later two rates more past an edge at which a split's best rate lies."""
        if not self.tried:
            return self._try(self.rates)
        wanted: list[float] = []
        for split in study.targets:
            best = nearest_rate(study, split, self.tried)
            down, up = best == min(self.tried), best == max(self.tried)
            steps = (-1, 1) if down and up else (-2, -1) if down else (1, 2) if up else ()
            wanted += [self.exact[best] * self.ratio**step for step in steps if best is not None]
        reached = any(best_rate(study, split, self.tried) is not None for split in study.targets)
        if not wanted or self.extensions[reached] == EXTENSIONS:
            return []
        self.extensions[reached] += 1
        return self._try(wanted)

    def halfway(self, study: Study) -> list[float]:
        """Two rates halfway beside each split's best, once a split, where it lies within those tried.

        Of a sparse grid its neighbours with them, and once more: the best may be one of those. Its neighbours are tried
        where no rate reached the target, too: one between may be the only one that does.
        """
        wanted: list[float] = []
        for split in study.targets:
            done, reached = self.refined.get(split, 0), best_rate(study, split, self.tried)
            between = self.skipped if not done else []
            best = nearest_rate(study, split, self.tried) if between else reached
            if best is None or not min(self.tried) < best < max(self.tried) or done > bool(self.skipped):
                continue
            self.refined[split] = done + 1
            below, above = (max(r for r in self.tried if r < best), min(r for r in self.tried if r > best))
            wanted += [self.exact[rate] for rate in between if below < rate < above]
            if reached is not None:
                wanted += [self.exact[best] / math.sqrt(self.ratio), self.exact[best] * math.sqrt(self.ratio)]
        return self._try(wanted)

    def _around(self, near: float) -> list[float]:
        """The rates nearest to one; beyond the ends of the grid its steps go on."""
        low, high = self.exact[self.rates[0]], self.exact[self.rates[-1]]
        beyond = [low * self.ratio**-step for step in range(1, _steps(near, low, self.ratio) + 1)]
        beyond += [high * self.ratio**step for step in range(1, _steps(high, near, self.ratio) + 1)]
        known = sorted({*self.rates, *self._named(beyond)}, key=lambda rate: abs(math.log(rate / near)))
        close = [rate for rate in known if abs(math.log(rate / near)) <= math.log(NEAR) + _SAME]
        return sorted(close if len(close) >= FEW else known[:FEW])

    def _try(self, rates: Sequence[float]) -> list[float]:
        wanted = self._named(rates)
        fresh = sorted(rate for rate in wanted if all(abs(rate / other - 1) > _SAME for other in self.tried))
        self.tried = sorted([*self.tried, *fresh])
        return fresh

    def _named(self, rates: Sequence[float]) -> set[float]:
        """Rates as they are trained. Two halvings of a rounded rate would not be a rounded quarter."""
        for rate in rates:
            self.exact.setdefault(rounded(rate), rate)
        return {rounded(rate) for rate in rates}


def _steps(low: float, high: float, ratio: float) -> int:
    """Steps of a grid from one rate to another, 0 where that is no way up."""
    return max(0, round(math.log(high / low) / math.log(ratio)))


class Racing(Search):
    """A grid whose rates are tried by the first seed, and by the others where they can have the least median.

    In turn: the first seed at all rates, past the edges too; the other seeds at the rates where it came within REACH
    of its best, together with all seeds halfway beside that; what the medians then ask for. A rate stays out only
    while its first seed is known to take SURE times the least median; otherwise it is run on.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.last: Proposal | None = None

    def next_rates(self, study: Study) -> list[float]:
        """The rates of the whole grid, as `Search.next_rates`."""
        return self.grid.next_rates(study)

    def propose(self, study: Study) -> Proposal | None:
        """As `Search.propose`."""
        seeds = tuple(study.seeds)
        if len(seeds) == 1:
            return _proposal([(rate, seeds[0]) for rate in self.next_rates(study)], seeds, FIRST)
        first = replace(study, seeds=seeds[:1])
        fresh = self.grid.outward(first) or self.grid.outward(study)
        if fresh:
            return _proposal([(rate, seeds[0]) for rate in fresh], seeds[:1], REACH)
        begun = any(self._whole(study, rate) for rate in self.grid.tried)
        runs = [run for split in study.targets for run in self._contenders(study, first, split)]
        if not begun and not runs:
            runs = self._nearest(study)
        beside = [] if begun and runs else self.grid.halfway(study if begun else first)
        if not begun:
            self.grid.refined.clear()  # the medians may ask for other rates than the first seed
        proposal = _proposal(runs + [(rate, seed) for rate in beside for seed in seeds], seeds, SURE)
        if proposal == self.last:
            return None  # nothing of it was left to run
        self.last = proposal
        return proposal

    def _contenders(self, study: Study, first: Study, split: str) -> list[tuple[float, int]]:
        """Trials without which a rate is neither in nor out."""
        best = min(first.median(split, rate) for rate in self.grid.tried)
        # A rate that half of the seeds reach is taken only where no other is better: it puts none out.
        ranks = [study.rank(split, rate) for rate in self.grid.tried if self._whole(study, rate)]
        whole = [math.inf if half else median for half, median in ranks]
        sure = min(SURE * min(whole, default=0.0), study.cap)  # infinite medians: every rate is run to the cap
        limit, runs = max(REACH * best, sure), []
        for rate in self.grid.tried:
            if self._whole(study, rate):
                continue
            outcome = study.ended[rate, study.seeds[0]]
            if math.isfinite(steps := first.median(split, rate)) and steps <= limit:
                runs += [(rate, seed) for seed in study.seeds if (rate, seed) not in study.ended]
            elif outcome.end == "capped" and outcome.steps < sure:
                runs.append((rate, study.seeds[0]))
        return runs

    def _nearest(self, study: Study) -> list[tuple[float, int]]:
        """The other seeds where the first one came nearest: that no rate reaches shall not stand on one seed alone."""
        ended = [(rate, study.ended[rate, study.seeds[0]]) for rate in self.grid.tried]
        left = [(float(o.trajectory.loss(split)[-1]), rate) for split in study.targets for rate, o in ended]
        near = min((entry for entry in left if math.isfinite(entry[0])), default=None)
        return [] if near is None else [(near[1], seed) for seed in study.seeds[1:]]

    @staticmethod
    def _whole(study: Study, rate: float) -> bool:
        return all((rate, seed) in study.ended for seed in study.seeds)


class Sampled(Search):
    """Rates between two ends, chosen by an Optuna sampler for the first target (Akiba et al. 2019)."""

    def __init__(self, sampler: str, low: float, high: float, count: int, seed: int) -> None:
        optuna = load_optuna(sampler)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        made = getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed)
        self.optuna_study = optuna.create_study(sampler=made, direction="minimize")
        self.space = {"lr": optuna.distributions.FloatDistribution(low, high, log=True)}
        self.count, self.asked = count, 0
        self.open: list[tuple[Any, float]] = []

    def next_rates(self, study: Study) -> list[float]:
        """As `Search.next_rates`."""
        split = next(iter(study.targets))
        for trial, rate in self.open:
            # An unreached target must rank behind every reached one, and samplers take no infinity.
            half, median = study.rank(split, rate)
            self.optuna_study.tell(trial, min(median + half * study.cap, 2.0 * study.cap))
        asked = [self.optuna_study.ask(self.space) for _ in range(min(ASKED, self.count - self.asked))]
        self.asked += len(asked)
        self.open = [(trial, rounded(trial.params["lr"])) for trial in asked]
        return sorted({rate for _, rate in self.open})


def load_optuna(sampler: str) -> Any:
    """The module; raises UsageError where it is not installed, or for a sampler it has not."""
    if sampler not in SAMPLERS:
        raise unknown("search", sampler, [*GRIDS, *SAMPLERS])
    try:
        import optuna
    except ImportError:
        raise UsageError(
            f"search {sampler!r} needs Optuna, which is not installed. Run: pip install 'pybatch[optuna]', "
            "or use the grid."
        ) from None
    return optuna


def default_rates(optimizer: str, group: dict[str, Any]) -> list[float]:
    """The first grid for an optimizer: powers of two, so that trials of different searches coincide."""
    if optimizer == "sgd":
        # Plain SGD trains small networks well near 1/2; momentum multiplies a step by 1 / (1 - momentum).
        if not (momentum := group.get("momentum", 0.0)) < 1:
            raise UsageError(f"momentum {momentum:g} has no usual rates. Give a momentum below 1, or rates to try.")
        centre = math.log2(0.25 * (1 - momentum))
    elif is_own(optimizer):
        centre = math.log2(float(group["lr"]))  # the rate that its user trains with
    else:
        centre = math.log2(float(group["lr"])) + 2  # defaults are made for long runs of large models
    return [2.0 ** (round(centre) + k) for k in range(-RATES // 2, RATES - RATES // 2)]
