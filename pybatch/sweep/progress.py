"""What a sweep says on its way: a row for each batch size and rule, what is missing to a target, the share done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pybatch.base import numerals as n
from pybatch.records import ConvergencePoint
from pybatch.training.trial import Outcome
from pybatch.workloads.base import Progress

_WIDE = 24  # of a cell: two splits fit into 80 columns


def heading(targets: Mapping[str, float]) -> str:
    """The heading of the rows."""
    cells = (f"steps to {split} {n.number(target)}" for split, target in targets.items())
    return _line("batch", "rule", cells)


def row(batch: int, rule: str, points: Sequence[ConvergencePoint | None]) -> str:
    """Steps, the runs that reached the target, and the rate, for each split; None where a rule has no trials for it."""
    return _line(n.count(batch), rule, (_cell(point) for point in points))


def failed_row(batch: int, rule: str, reason: str) -> str:
    """A row without steps."""
    return _line(n.count(batch), rule, [reason])


def _line(batch: str, rule: str, cells: Iterable[str]) -> str:
    parts = "  ".join(f"{cell:<{_WIDE}}" for cell in cells)
    return f"{batch:>6}  {rule:<8}  {parts}".rstrip()


def _cell(point: ConvergencePoint | None) -> str:
    if point is None:
        return ""
    value = n.count(point.steps) if point.steps is not None else point.status.replace("_", " ")
    rate = f" at {n.number(point.learning_rate, 2)}" if point.learning_rate is not None else ""
    return f"{value} ({point.reached}/{point.runs}){rate}"


class SweepProgress:
    """Progress of a whole sweep: outcomes are put away and counted, and a worker's progress becomes the sweep's.

    Args:
        put: keeps an outcome.
        progress: called with (what is being done, share done), or None.
        alone: trials are run in this process, whose own progress says more than a count of outcomes.
    """

    def __init__(self, put: Callable[[Outcome], None], progress: Progress | None, alone: bool) -> None:
        self._put, self._progress, self._alone = put, progress, alone
        self.ended = 0  # trials
        self.rows, self.over = 0, 0  # batch sizes and rules: all, and those that are over

    def deliver(self, outcome: Outcome) -> None:
        """Keep an outcome, and say so."""
        self._put(outcome)
        self.ended += 1
        if not self._alone:
            self(f"trials: {self.ended} done, batch {outcome.trial.batch} at work", 0.0)

    def __call__(self, text: str, share: float) -> None:
        """What is being done now; the share is that of the whole sweep."""
        if self._progress is not None:
            done = f"; {self.over} of {self.rows} rows" if self.rows else ""
            self._progress(text + done, self.over / max(1, self.rows))
