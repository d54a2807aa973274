"""Whether a larger batch generalizes worse: the gap of test and train loss, seed by seed over all batch sizes. Pure.

A test loss alone says how far a run was trained: after 18 steps it is merely untrained. So it is set beside the train
loss, or compared where train losses are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pybatch.answer.claim import Claim, Finding
from pybatch.answer.pairing import Estimate, shortfall, trend, trend_of
from pybatch.base import numerals as n
from pybatch.records import Convergence, ConvergencePoint, Curve

Losses = Callable[[ConvergencePoint], Sequence[float | None]]  # by seed


@dataclass(frozen=True)
class _Budget:
    """What runs of all batch sizes have in common where their losses are compared."""

    name: str  # after "gap" in a label
    text: str
    end: str  # what no seed came to, where none did
    test: Losses
    train: Losses | None  # None: equal by design


def gap_claims(steps: Convergence, curve: Curve) -> list[Claim]:
    """At equal train loss, and at equal epochs and equal steps where a sweep measured them."""
    return [_gap(curve, budget) for budget in _budgets(steps, curve)]


def _budgets(steps: Convergence, curve: Curve) -> list[_Budget]:
    found = []
    if curve.split == "train":
        at = f"where train loss {n.number(curve.target)} was met"
        found.append(_Budget("", at, "reached the target", lambda p: p.other_losses if _reaches(p) else (), None))
    if steps.gap_epochs is None or not any(p.test_losses_at_epochs for p in curve.points):
        return found
    epochs = f"{steps.gap_epochs:g} epoch{'s' * (steps.gap_epochs != 1)}"
    updates = n.counted(steps.gap_steps or 0, "step")
    return [
        *found,
        _Budget(
            f", {epochs}",
            f"after {epochs}",
            "got so far",
            lambda p: p.test_losses_at_epochs,
            lambda p: p.train_losses_at_epochs,
        ),
        _Budget(
            f", {updates}",
            f"after {updates}",
            "got so far",
            lambda p: p.test_losses_at_steps,
            lambda p: p.train_losses_at_steps,
        ),
    ]


def _gap(curve: Curve, budget: _Budget) -> Claim:
    name, claim = f"{curve.rule}: gap{budget.name}", "a larger batch generalizes worse"
    points = sorted(curve.points, key=lambda p: p.batch)
    tests = {p.batch: budget.test(p) for p in points}
    tests = {batch: losses for batch, losses in tests.items() if any(loss is not None for loss in losses)}
    if len(tests) < 2:
        text = f"fewer than two batch sizes have a test loss {budget.text}"
        return Claim(name, claim, "not measured", text)
    trains = {p.batch: budget.train(p) for p in points} if budget.train is not None else None
    if trains is not None and not any(trains[batch] for batch in tests):
        text = f"the record has no train losses {budget.text}, and test losses alone say how far a run was trained"
        return Claim(name, claim, "not measured", text)
    small, large = min(tests), max(tests)
    count = max(p.seeds for p in points)
    kept = {seed: rows for seed in range(count) if (rows := _of_seed(tests, trains, seed)).keys() >= {small, large}}
    if not kept:
        return Claim(name, claim, "not measured", f"no seed {budget.end} at both ends")
    gap, test, train = (_trend(kept, signs) for signs in ((1, -1), (1, 0), (0, 1)))
    missing, diverged = len(kept) < count, _diverged(points, large)
    finding: Finding = "undetermined"
    # A gap that comes with being trained further, or less far, is no other generalization.
    if gap.low > 0 and (train.value >= 0 or test.low > 0):
        finding = "yes"
    elif gap.high < 0 and (train.value <= 0 or test.high < 0) and not missing and not diverged:
        finding = "no"
    here, there = (_means([rows[batch] for rows in kept.values()]) for batch in (small, large))
    what = "the test loss" if trains is None else "the gap of test and train loss"
    span = f"from {n.count(small)} to {n.count(large)}"
    text = f"{budget.text}, each doubling {span} adds {gap.words(signed=True)} to {what}"
    if trains is None:
        text += f" ({n.number(here[0])} to {n.number(there[0])})"
    else:
        text += (
            f" (test {n.number(here[0])}, train {n.number(here[1])} with {n.count(small)}; test {n.number(there[0])}, "
            f"train {n.number(there[1])} with {n.count(large)})"
        )
        if finding == "undetermined" and not gap.low <= 0 <= gap.high and not missing and not diverged:
            text += f", trained {'less' if train.value > 0 else 'further'} with larger batches"
    if missing:  # the others diverged or never came there, and would have been worse
        text += f"; {len(kept)} of {n.counted(count, 'seed')}"
    text += shortfall(points) if budget.train is None else diverged
    low, high = (gap.low, gap.high) if gap.seeds > 1 else (None, None)
    return Claim(name, claim, finding, text, gap.value, low, high, len(kept))


def _of_seed(
    tests: dict[int, Sequence[float | None]], trains: dict[int, Sequence[float | None]] | None, seed: int
) -> dict[int, tuple[float, float]]:
    """Test and train loss of a seed by batch size, where both are known; the latter is 0 where all have the same."""
    found = {}
    for batch, losses in tests.items():
        test = losses[seed] if seed < len(losses) else None
        train: float | None = 0.0
        if trains is not None:
            train = trains[batch][seed] if seed < len(trains[batch]) else None
        if test is not None and train is not None:
            found[batch] = (test, train)
    return found


def _trend(kept: dict[int, dict[int, tuple[float, float]]], signs: tuple[int, int]) -> Estimate:
    """The mean over seeds of the slope of a sum of test and train loss, each with its sign."""
    return trend_of(
        [
            trend({batch: signs[0] * test + signs[1] * train for batch, (test, train) in rows.items()})
            for rows in kept.values()
        ]
    )


def _means(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(test for test, _ in rows) / len(rows), sum(train for _, train in rows) / len(rows)


def _diverged(points: Sequence[ConvergencePoint], large: int) -> str:
    broken = [n.count(p.batch) for p in points if p.batch > large and p.status == "diverged"]
    return f"; diverged at {', '.join(broken)}" if broken else ""


def _reaches(p: ConvergencePoint) -> bool:
    return p.status == "reached" and p.steps is not None
