"""What a sweep is asked for: one frozen object from the flags to the store and the record. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypedDict

from pybatch import scaling
from pybatch.base.arguments import check, check_seed
from pybatch.base.errors import UsageError, unknown
from pybatch.base.plain import said
from pybatch.sweep.search import GRIDS, SAMPLERS, Grid, Racing, Sampled, Search, load_optuna
from pybatch.training.schedules import SCHEDULES
from pybatch.training.trajectory import SPLITS, Split, ordered, split_of
from pybatch.training.trial import rounded

MAX_STEPS = 5000
# What a later sweep may add to; any other option with another value makes another experiment.
EXTENDED = ("batches", "rules", "seeds", "max_steps", "gap_epochs")


def _number(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least < value < math.inf


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(fits, value))


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _targets(value: Any) -> bool:
    return isinstance(value, dict) and all(split_of(name) in SPLITS and _number(v) for name, v in value.items())


# What an option in a store must be: of what else it was checked for, a rule or a sampler need not be here.
_STORED: Mapping[str, Callable[[Any], bool]] = {
    "batches": _list_of(lambda batch: _whole(batch, 1)),
    "rules": _list_of(_text),
    "seeds": lambda value: _whole(value, 1),
    "seed": lambda value: _whole(value, 0),
    "target": _targets,
    "optimizer": _text,
    "options": lambda value: isinstance(value, dict),
    "rates": _list_of(lambda rate: _number(rate, 0)),
    "search": _text,
    "base_batch": lambda value: _whole(value, 1),
    "base_rate": _or_none(lambda rate: _number(rate, 0)),
    "max_steps": lambda value: _whole(value, 1),
    "dtype": _text,
    "gap_epochs": _or_none(lambda epochs: _number(epochs, 0)),
    "schedule": _or_none(_text),
    "beta2_rule": _text,
    "decay_rule": _text,
}


class SweepKeywords(TypedDict, total=False):
    """The options of `SweepOptions` beside batches, rules and seeds, as keywords of `measure_convergence`."""

    seed: int
    target: Mapping[str, float] | None
    optimizer: str | None
    options: Mapping[str, Any]
    schedule: str | None
    beta2_rule: str
    decay_rule: str
    rates: Sequence[float] | None
    search: str
    base_batch: int | None
    base_rate: float | None
    max_steps: int
    dtype: str
    gap_epochs: float | None


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a sweep is asked for; `checks.settled` fills in what the workload and the optimizer decide.

    Args:
        batches: batch sizes, in examples.
        rules: names of `pybatch.scaling.rules()`. "tuned" searches the rate at every batch size; the others start from
            the rate at `base_batch`, tuned or given.
        seeds: training runs of each batch size and rate, each with a model and a data order of its own.
        seed: of the first of them; the others count up from it. With a store, more `seeds` add to those it holds, and
            another `seed`, at least `seeds` away, repeats the experiment; a report pools the two.
        target: losses to reach, by split, and metrics, as {"train": 0.1, "test:accuracy": 0.95}; None: the workload's.
        optimizer: a name of `pybatch.optim`, in any case, or "own", the workload's. None: its own, else `swept_by`.
        options: its arguments but the learning rate, such as {"momentum": 0.9}.
        schedule: a name of `training.schedules.SCHEDULES`: "constant", "cosine", "wsd", "average", or "own", the
            workload's. None: its own, else "constant". Under an anneal, steps to a target are the length of the
            shortest training that ends at it.
        beta2_rule: how Adam's second beta follows the batch size: "constant" or "half-life", see `scaling.followed`.
        decay_rule: how weight decay follows it: "constant", "linear" or "timescale".
        rates: first learning rates of a search; None: 12, a factor of 2 apart. Where the best
            one is the lowest or highest, more are tried; then two halfway beside it.
        search: "race" tries every rate with the first seed at the base batch (with one seed every second rate, then
            those beside the best), and at the others those near the rate that follows from its best by the square root
            of the batch size; it gives up what is behind, and runs the other seeds at the rates that can still have the
            least median. "grid" runs every seed at every rate; or an Optuna sampler ("tpe", "qmc", "random", "cmaes")
            between the ends of `rates`.
        base_batch: where the rules start; None: the smallest of `batches`.
        base_rate: their learning rate there; None: the one of the fewest steps to each target, which is sought first.
        max_steps: a trial is given up then; earlier after 4 times the steps the base batch took (times B_0 / B below
            it), in a search after 1.5 times the median steps of the best rate, or sooner: see `search`; and under
            another rule after 4 times the tuned steps at its batch size. Where neither the base batch nor the largest
            one reaches a target, the others are not tried.
        dtype: "fp32", "bf16" or "fp16" (autocast over fp32 parameters).
        gap_epochs: compare test losses after so many epochs too, and after the steps that the largest batch takes in
            them: when all else is done, the runs at each batch size's rate are made again, to that length. None: at
            the train target alone.

    Raises:
        UsageError: an option that cannot work, whatever is trained.
    """

    batches: Sequence[int]
    rules: Sequence[str] = (scaling.SEARCHED,)
    seeds: int = 3
    seed: int = 0
    target: Mapping[str, float] | None = None
    optimizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    beta2_rule: str = "constant"
    decay_rule: str = "constant"
    rates: Sequence[float] | None = None
    search: str = "race"
    base_batch: int | None = None
    base_rate: float | None = None
    max_steps: int = MAX_STEPS
    dtype: str = "fp32"
    gap_epochs: float | None = None

    def __post_init__(self) -> None:
        self._check()
        self._normalize()

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> Self:
        """Settled options as a store has them.

        They were checked when they were asked for: a rule or a sampler of theirs need not be here, where they are read.
        """
        made, names = cls.__new__(cls), {each.name for each in dataclasses.fields(cls)}
        if odd := sorted(set(data) ^ names):
            raise ValueError(f"options {odd} are unknown or missing")
        for name, fits in _STORED.items():
            if not fits(data[name]):
                raise ValueError(f"option {name} is {said(data[name])}")
        for name in names:
            object.__setattr__(made, name, data[name])
        made._normalize()
        return made

    def _normalize(self) -> None:
        """One form for options that ask for the same."""
        plain: dict[str, Any] = {
            "batches": tuple(sorted({int(batch) for batch in self.batches})),
            "rules": tuple(dict.fromkeys(self.rules)),
            "optimizer": self.optimizer.lower() if self.optimizer is not None else None,
            "options": dict(self.options),
        }
        if self.target is not None:
            plain["target"] = {name: float(self.target[name]) for name in ordered(self.target)}
        if self.rates is not None:
            plain["rates"] = tuple({rounded(rate): float(rate) for rate in sorted(self.rates, reverse=True)}.values())[
                ::-1
            ]
        if self.base_rate is not None:
            plain["base_rate"] = rounded(self.base_rate)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        given: object = self.optimizer
        if not isinstance(given, str | None):
            what = given.__name__ if isinstance(given, type) else type(given).__name__
            raise UsageError(f"optimizer {what} is no name. Give a name of pybatch.optim, such as 'adamw'.")
        hints = typing.get_type_hints(type(self))
        check(hints, {name: getattr(self, name) for name in hints})
        if not len(self.batches) or min(self.batches) < 1:
            raise UsageError(f"batches {list(self.batches)}: give at least one batch size, each a whole number from 1.")
        for rule in self.rules:
            if rule not in scaling.rules():
                raise unknown("rule", rule, scaling.rules())
        if not self.rules:
            raise UsageError("no rule was given. Give at least one, such as 'tuned'.")
        if self.base_rate is not None:
            if not 0 < self.base_rate < math.inf:
                raise UsageError(f"base rate {self.base_rate:g}: give a finite learning rate above 0.")
            if set(self.rules) == {scaling.SEARCHED}:
                raise UsageError(
                    f"base rate {self.base_rate:g}: rule 'tuned' seeks its own rates. Add a rule that starts from it, "
                    "such as 'linear', or leave it out."
                )
        if self.seeds < 1:
            raise UsageError(f"seeds {self.seeds} is below 1. Give at least 1; 3 show an interval.")
        check_seed(self.seed, self.seeds)
        if self.max_steps < 1:
            raise UsageError(f"max_steps {self.max_steps} is below 1. Give the steps after which a trial is given up.")
        for split, loss in (self.target or {}).items():
            if split_of(split) not in SPLITS:
                raise unknown("target split", split_of(split), SPLITS)
            if not loss > -math.inf:
                raise UsageError(f"target {split}={loss}: give a number.")
        if self.rates is not None and not (len(self.rates) and all(0 < rate < math.inf for rate in self.rates)):
            raise UsageError(f"rates {list(self.rates)}: give finite learning rates above 0.")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name, rule in (("beta2", self.beta2_rule), ("decay", self.decay_rule)):
            if rule not in scaling.FOLLOWING[name]:
                raise unknown(f"{name} rule", rule, scaling.FOLLOWING[name])
        if self.beta2_rule != "constant" and "adam-sde" in self.rules:
            raise UsageError("beta2 rule: rule 'adam-sde' sets the betas itself. Leave one of the two out.")
        if self.decay_rule == "timescale" and (unruled := {scaling.SEARCHED, "adascale"} & set(self.rules)):
            raise UsageError(
                f"decay rule 'timescale' goes by the rate that a rule gives, and rule {min(unruled)!r} gives none "
                "ahead. Take decay rule 'linear', or leave that rule out."
            )
        if self.search not in GRIDS:
            load_optuna(self.search)

    @property
    def targets(self) -> dict[str, float]:
        """Losses to reach, by split; of settled options."""
        assert self.target is not None
        return dict(self.target)

    @property
    def following(self) -> dict[str, str]:
        """What follows the batch size beside the rate, by the name of its rule."""
        rules = {"beta2": self.beta2_rule, "weight decay": self.decay_rule}
        return {name: rule for name, rule in rules.items() if rule != "constant"}

    @property
    def trained_by(self) -> str:
        """The optimizer's name; of settled options."""
        assert self.optimizer is not None
        return self.optimizer

    @property
    def start_batch(self) -> int:
        """The base batch: given, or the smallest."""
        return self.base_batch if self.base_batch is not None else self.batches[0]

    @property
    def seed_range(self) -> tuple[int, ...]:
        """The seed of every training run of a rate."""
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def seeks(self) -> bool:
        """Whether rates are sought at every batch size, and not at the base batch alone."""
        return scaling.SEARCHED in self.rules

    @property
    def compared(self) -> Split:
        """The split whose target chooses the rates at which test losses are compared; of settled options."""
        return ordered(self.targets)[0]

    def searcher(self, near: float | None = None) -> Search:
        """A search for one batch size, with a rate that a race begins at; of settled options."""
        assert self.rates is not None
        if self.search in SAMPLERS:
            return Sampled(self.search, min(self.rates), max(self.rates), max(len(self.rates), 12), self.seed)
        if self.search == "grid":
            return Grid(self.rates)
        # The neighbours that a sparse grid tries later would be run by all seeds: of several it spares nothing.
        return Racing(Grid(self.rates, near, sparse=self.seeds == 1))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `SweepOptions(**data)` reads them back."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    @property
    def fixed(self) -> dict[str, Any]:
        """What makes an experiment: all options but those a later sweep may add to, as plain JSON types."""
        return {name: value for name, value in self.to_dict().items() if name not in EXTENDED}
