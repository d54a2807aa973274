"""Which trials to run at a batch size: a log grid of rates that grows past its edges, a race over it, or Optuna.

In a race the first seed tries every rate, and the other seeds run only those that can still have the least median.
What it saves are the seeds of rates that are out; the rate chosen is that of the whole grid unless a rate's first seed
is SURE times slower than the best median while the rate's own median is the best.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pybatch.base.errors import UsageError, unknown
from pybatch.training.trial import Race, rounded

RATES = 12  # of the first grid, a factor of 2 apart: 2000-fold from the lowest to the highest
EXTENSIONS = 4  # of two rates each, past an edge at which the best rate lies
ASKED = 4  # rates asked of a sampler at a time: they are trained together
REACH = 1.35  # times the first seed's best: rates that all seeds run at once, as the least median is not known yet
SURE = 1.2  # times the least median: a rate whose first seed takes longer is out; seeds differ by some 5 to 10 %
_SAME = 1e-4  # relative: rates that differ by rounding only
GRIDS = ("race", "grid")
SAMPLERS = {"tpe": "TPESampler", "qmc": "QMCSampler", "random": "RandomSampler", "cmaes": "CmaEsSampler"}


@dataclass(frozen=True)
class Heat:
    """Trials to run together, and the seeds over whose median a rate ends the slower ones."""

    cells: tuple[tuple[float, int], ...]  # (rate, seed)
    seeds: tuple[int, ...]


class Search(ABC):
    """The trials of one race, in heats."""

    @abstractmethod
    def propose(self, race: Race) -> list[float]:
        """The next rates to try, given all outcomes so far; empty when the search is over."""

    def heat(self, race: Race) -> Heat | None:
        """The next trials, given all outcomes so far, every rate with every seed; None when the search is over."""
        seeds = tuple(race.seeds)
        return _heat([(rate, seed) for rate in self.propose(race) for seed in seeds], seeds)


def _heat(cells: Sequence[tuple[float, int]], seeds: tuple[int, ...]) -> Heat | None:
    return Heat(tuple(dict.fromkeys(cells)), seeds) if cells else None


def best_rate(race: Race, split: str, rates: Sequence[float]) -> float | None:
    """The rate of the fewest median steps, the lowest of equals; None where none reached the target.

    Of an even number of seeds, a rate that half of them reach is taken where no rate is reached by more.
    """
    best = min(sorted(rates), key=lambda lr: race.rank(split, lr), default=None)
    return best if best is not None and math.isfinite(race.median(split, best)) else None


def at_edge(race: Race, split: str, rates: Sequence[float]) -> bool:
    """Whether the best rate is the lowest or the highest one tried."""
    best = best_rate(race, split, rates)
    return best is not None and best in (min(rates), max(rates))


class Grid(Search):
    """A log grid; two rates more past an edge where the best lies there, then two rates halfway beside the best."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = sorted({rounded(rate) for rate in rates})
        self.ratio = (self.rates[-1] / self.rates[0]) ** (1 / (len(self.rates) - 1)) if len(self.rates) > 1 else 2.0
        self.tried: list[float] = []
        self.extensions = 0
        self.refined: set[str] = set()

    def propose(self, race: Race) -> list[float]:
        """As `Search.propose`."""
        return self.outward(race) or self.halfway(race)

    def outward(self, race: Race) -> list[float]:
        """The first grid; later two rates more past an edge at which a split's best rate lies."""
        if not self.tried:
            return self._try(self.rates)
        wanted: list[float] = []
        for split in race.targets:
            best = best_rate(race, split, self.tried)
            steps = (-2, -1) if best == min(self.tried) else (1, 2) if best == max(self.tried) else ()
            wanted += [best * self.ratio**step for step in steps if best is not None]
        if not wanted or self.extensions == EXTENSIONS:
            return []
        self.extensions += 1
        return self._try(wanted)

    def halfway(self, race: Race) -> list[float]:
        """Two rates halfway beside each split's best, once a split, where it lies within those tried."""
        wanted: list[float] = []
        for split in race.targets:
            best = best_rate(race, split, self.tried)
            if best is not None and min(self.tried) < best < max(self.tried) and split not in self.refined:
                self.refined.add(split)
                wanted += [best / math.sqrt(self.ratio), best * math.sqrt(self.ratio)]
        return self._try(wanted)

    def _try(self, rates: Sequence[float]) -> list[float]:
        wanted = {rounded(rate) for rate in rates}
        fresh = sorted(rate for rate in wanted if all(abs(rate / other - 1) > _SAME for other in self.tried))
        self.tried = sorted([*self.tried, *fresh])
        return fresh


class Racing(Search):
    """A grid whose rates are tried by the first seed, and by the others where they can have the least median.

    In turn: the first seed at all rates, past the edges too; the other seeds at the rates where it came within REACH
    of its best, together with all seeds halfway beside that; what the medians then ask for. A rate stays out only
    while its first seed is known to take SURE times the least median; otherwise it is run on.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.last: Heat | None = None

    def propose(self, race: Race) -> list[float]:
        """The rates of the whole grid, as `Search.propose`."""
        return self.grid.propose(race)

    def heat(self, race: Race) -> Heat | None:
        """As `Search.heat`."""
        seeds = tuple(race.seeds)
        if len(seeds) == 1:
            return super().heat(race)
        first = replace(race, seeds=seeds[:1])
        fresh = self.grid.outward(first) or self.grid.outward(race)
        if fresh:
            return _heat([(rate, seeds[0]) for rate in fresh], seeds[:1])
        begun = any(self._whole(race, rate) for rate in self.grid.tried)
        cells = [cell for split in race.targets for cell in self._contenders(race, first, split)]
        if not begun and not cells:
            cells = self._nearest(race)
        beside = [] if begun and cells else self.grid.halfway(race if begun else first)
        if not begun:
            self.grid.refined.clear()  # the medians may ask for other rates than the first seed
        heat = _heat(cells + [(rate, seed) for rate in beside for seed in seeds], seeds)
        if heat == self.last:
            return None  # nothing of it was left to run
        self.last = heat
        return heat

    def _contenders(self, race: Race, first: Race, split: str) -> list[tuple[float, int]]:
        """Trials without which a rate is neither in nor out."""
        best = min(first.median(split, rate) for rate in self.grid.tried)
        # A rate that half of the seeds reach is taken only where no other is better: it puts none out.
        ranks = [race.rank(split, rate) for rate in self.grid.tried if self._whole(race, rate)]
        whole = [math.inf if half else median for half, median in ranks]
        sure = min(SURE * min(whole, default=0.0), race.cap)  # infinite medians: every rate is run to the cap
        limit, cells = max(REACH * best, sure), []
        for rate in self.grid.tried:
            if self._whole(race, rate):
                continue
            outcome = race.ended[rate, race.seeds[0]]
            if math.isfinite(steps := first.median(split, rate)) and steps <= limit:
                cells += [(rate, seed) for seed in race.seeds if (rate, seed) not in race.ended]
            elif outcome.end == "capped" and outcome.steps < sure:
                cells.append((rate, race.seeds[0]))
        return cells

    def _nearest(self, race: Race) -> list[tuple[float, int]]:
        """The other seeds where the first one came nearest: that no rate reaches shall not stand on one seed alone."""
        ended = [(rate, race.ended[rate, race.seeds[0]]) for rate in self.grid.tried]
        left = [(float(o.trajectory.loss(split)[-1]), rate) for split in race.targets for rate, o in ended]
        near = min((entry for entry in left if math.isfinite(entry[0])), default=None)
        return [] if near is None else [(near[1], seed) for seed in race.seeds[1:]]

    @staticmethod
    def _whole(race: Race, rate: float) -> bool:
        return all((rate, seed) in race.ended for seed in race.seeds)


class Sampled(Search):
    """Rates between two ends, chosen by an Optuna sampler for the first target (Akiba et al. 2019)."""

    def __init__(self, sampler: str, low: float, high: float, count: int, seed: int) -> None:
        optuna = load_optuna(sampler)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        made = getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed)
        self.study = optuna.create_study(sampler=made, direction="minimize")
        self.space = {"lr": optuna.distributions.FloatDistribution(low, high, log=True)}
        self.count, self.asked = count, 0
        self.open: list[tuple[Any, float]] = []

    def propose(self, race: Race) -> list[float]:
        """As `Search.propose`."""
        split = next(iter(race.targets))
        for trial, rate in self.open:
            # An unreached target must rank behind every reached one, and samplers take no infinity.
            half, median = race.rank(split, rate)
            self.study.tell(trial, min(median + half * race.cap, 2.0 * race.cap))
        asked = [self.study.ask(self.space) for _ in range(min(ASKED, self.count - self.asked))]
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
    else:
        centre = math.log2(float(group["lr"])) + 2  # defaults are made for long runs of large models
    return [2.0 ** (round(centre) + k) for k in range(-RATES // 2, RATES - RATES // 2)]
