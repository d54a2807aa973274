"""A cell of a sweep on its way: one batch size under one rule, its trials, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pybatch.records import ConvergencePoint
from pybatch.sweep.contents import CellName
from pybatch.sweep.search import Search
from pybatch.sweep.summary import point
from pybatch.training.trial import SLACK, Outcome, Study, Trial


@dataclass
class Cell:
    """The trials of one batch size whose outcomes are compared: all rates of a search, or one rate of a rule."""

    name: CellName
    targets: dict[str, float]
    cap: int
    search: Search | None = None
    trials: dict[str, Trial] = field(default_factory=dict)  # by key
    now: list[Trial] = field(default_factory=list)  # those to run now
    seeds: tuple[int, ...] = ()  # over whose median a rate ends the slower ones of those
    margin: float = SLACK  # times that median, after which they end
    failed: str | None = None  # why it has no outcome
    claimed: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)  # once it is over
    over: bool = False

    @property
    def rule(self) -> str:
        """The rule whose trials they are."""
        return self.name[0]

    @property
    def batch(self) -> int:
        """Their batch size."""
        return self.name[2]

    def begin(self, trials: Iterable[Trial], seeds: tuple[int, ...], margin: float = SLACK) -> None:
        """Set the trials to run now."""
        self.now, self.seeds, self.margin = list(trials), seeds, margin
        self.trials |= {trial.key: trial for trial in self.now}

    def study(self, seeds: Sequence[int], outcomes: Sequence[Outcome]) -> Study:
        """The cell as its outcomes stand; once it is over, what runs past its cap have shown counts as well."""
        cap = max([self.cap, *(outcome.steps for outcome in outcomes)]) if self.over else self.cap
        study = Study(dict(self.targets), seeds, cap, self.search is not None, self.margin)
        for outcome in outcomes:
            study.take(outcome)
        return study

    def missing(self, stored: Mapping[str, Outcome]) -> list[Trial]:
        """Trials to run now that have not run far enough."""
        study = self.study(self.seeds, list(stored.values()))
        return [
            t for t in self.now if t.key not in stored or not stored[t.key].answers(study.targets, study.limits(t.lr))
        ]

    def points(self, seeds: Sequence[int]) -> dict[str, ConvergencePoint]:
        """What a cell that is over says of its batch size, by split."""
        study = self.study(seeds, self.outcomes)
        return {split: point(self.batch, split, study, self.outcomes) for split in self.targets}
