"""Which learning rates to try at a batch size: a log grid that grows past its edges, or an Optuna sampler."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pybatch.convergence.trial import Race
from pybatch.errors import UsageError, unknown

RATES = 12  # of the first grid, a factor of 2 apart: 2000-fold from the lowest to the highest
EXTENSIONS = 4  # of two rates each, past an edge at which the best rate lies
ASKED = 4  # rates asked of a sampler at a time: they are trained together
SAMPLERS = {"tpe": "TPESampler", "qmc": "QMCSampler", "random": "RandomSampler", "cmaes": "CmaEsSampler"}


class Search(ABC):
    """The rates of one race, in rounds."""

    @abstractmethod
    def propose(self, race: Race) -> list[float]:
        """The next rates to try, given all outcomes so far; empty when the search is over."""


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
        self.rates = sorted({_rounded(rate) for rate in rates})
        self.ratio = (self.rates[-1] / self.rates[0]) ** (1 / (len(self.rates) - 1)) if len(self.rates) > 1 else 2.0
        self.tried: list[float] = []
        self.extensions = 0
        self.refined: set[str] = set()

    def propose(self, race: Race) -> list[float]:
        """As `Search.propose`."""
        if not self.tried:
            return self._try(self.rates)
        wanted: list[float] = []
        extended = False
        for split in race.targets:
            best = best_rate(race, split, self.tried)
            if best is None:
                continue
            steps = (-2, -1) if best == min(self.tried) else (1, 2) if best == max(self.tried) else ()
            if steps and self.extensions < EXTENSIONS:
                extended = True
                wanted += [best * self.ratio**step for step in steps]
            elif not steps and split not in self.refined:
                self.refined.add(split)
                wanted += [best / math.sqrt(self.ratio), best * math.sqrt(self.ratio)]
        self.extensions += extended
        return self._try(wanted)

    def _try(self, rates: Sequence[float]) -> list[float]:
        fresh = sorted({_rounded(rate) for rate in rates} - set(self.tried))
        self.tried = sorted([*self.tried, *fresh])
        return fresh


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
        self.open = [(trial, _rounded(trial.params["lr"])) for trial in asked]
        return sorted({rate for _, rate in self.open})


def load_optuna(sampler: str) -> Any:
    """The module; raises UsageError where it is not installed, or for a sampler it has not."""
    if sampler not in SAMPLERS:
        raise unknown("search", sampler, ["grid", *SAMPLERS])
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


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")  # the same name for a rate reached by different arithmetic
