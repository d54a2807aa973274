"""A contest: trials whose outcomes are compared, and how far they have come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pybatch.records import ConvergencePoint
from pybatch.sweep.search import Search
from pybatch.sweep.summary import point
from pybatch.training.trial import Outcome, Race, Trial


@dataclass
class Contest:
    """The trials of one batch size whose outcomes are compared: all rates of a search, or one rate of a rule."""

    rule: str
    batch: int
    targets: dict[str, float]
    cap: int
    search: Search | None
    trials: dict[str, Trial] = field(default_factory=dict)  # by key
    heat: list[Trial] = field(default_factory=list)  # those to run now
    seeds: tuple[int, ...] = ()  # over whose median a rate ends the slower ones of the heat
    failed: str | None = None  # why it has no outcome
    claimed: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)  # once it is over
    over: bool = False
    continues: Contest | None = None  # whose runs go on here

    def race(self, seeds: Sequence[int], outcomes: Sequence[Outcome]) -> Race:
        """The contest as its outcomes stand; once it is over, what runs past its cap have shown counts as well."""
        cap = max([self.cap, *(outcome.steps for outcome in outcomes)]) if self.over else self.cap
        race = Race(dict(self.targets), seeds, cap, self.search is not None)
        for outcome in outcomes:
            race.take(outcome)
        return race

    def points(self, seeds: Sequence[int]) -> dict[str, ConvergencePoint]:
        """What a contest that is over says of its batch size, by split."""
        race = self.race(seeds, self.outcomes)
        return {split: point(self.batch, split, race, self.outcomes) for split in self.targets}
