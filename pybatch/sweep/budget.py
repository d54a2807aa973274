"""Equal budgets: what runs of every batch size have learned after equal epochs, and after equal steps. No torch here.

Runs end where their target is met; for a test loss at equal budgets, those at each batch size's chosen rate go on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pybatch.base import numerals as n
from pybatch.base.errors import UsageError
from pybatch.records import ConvergencePoint
from pybatch.training.trajectory import loss_at
from pybatch.training.trial import Outcome

TESTED = "test"  # the split whose losses are compared
NEVER = -math.inf  # a target that lets a run go on to its cap


@dataclass(frozen=True)
class Budget:
    """So many epochs over a training set; and the steps that the largest batch size takes in them, for all."""

    epochs: float
    examples: int  # of the training set
    steps: int

    @staticmethod
    def of(epochs: float, examples: int, batches: Sequence[int]) -> Budget:
        """The budget of a sweep over these batch sizes."""
        return Budget(epochs, examples, _steps(epochs, examples, max(batches)))

    def steps_at(self, batch: int) -> int:
        """Steps of a batch size in the epochs, the last one begun counted as whole."""
        return _steps(self.epochs, self.examples, batch)

    def spent(self, outcome: Outcome) -> bool:
        """Whether a run went as far as it can: to the end of the epochs, or until it diverged."""
        return outcome.end == "diverged" or outcome.steps >= self.steps_at(outcome.trial.batch)


def _steps(epochs: float, examples: int, batch: int) -> int:
    return math.ceil(epochs * examples / batch * (1 - 1e-12))  # 1.1 epochs of 100 are 110 examples, and no more


def checked_budget(epochs: float | None, examples: int | None, batches: Sequence[int], cap: int) -> Budget | None:
    """The budget asked for; None where none is.

    Raises:
        UsageError: there are no epochs, they are less than a step, or more steps than a run may take.
    """
    if epochs is None:
        return None
    if not 0 < epochs < math.inf:
        raise UsageError(f"gap epochs {epochs:g}: give epochs above 0, such as 30.")
    if examples is None:
        raise UsageError(
            f"gap epochs {epochs:g}: the workload names no number of training examples, so it has no epochs. Leave "
            "them out, or set its `examples`."
        )
    seen, large, small = epochs * examples, max(batches), min(batches)
    if seen < large:
        raise UsageError(
            f"gap epochs {epochs:g} are {n.count(int(seen))} examples, less than one step of batch {large}. Give more "
            "epochs, or smaller batches."
        )
    budget = Budget.of(epochs, examples, batches)
    if (steps := budget.steps_at(small)) > cap:
        raise UsageError(
            f"gap epochs {epochs:g} are {steps} steps of batch {small}, above max_steps {cap}. Allow {steps} steps, or "
            "give fewer epochs or larger batches."
        )
    return budget


def with_losses(
    point: ConvergencePoint, outcomes: Sequence[Outcome], seeds: Sequence[int], budget: Budget | None
) -> ConvergencePoint:
    """A point with the losses of its runs after the budget's epochs and steps, of both splits.

    Args:
        point: one batch size of a curve.
        outcomes: of its trials; those at its rate are read.
        seeds: in the order of the losses.
        budget: None leaves the point as it is.
    """
    if budget is None or point.learning_rate is None:
        return point
    runs = {outcome.trial.seed: outcome.trajectory for outcome in outcomes if outcome.trial.lr == point.learning_rate}

    def after(split: str, steps: int) -> tuple[float | None, ...]:
        return tuple(loss_at(runs[seed], split, steps) if seed in runs else None for seed in seeds)

    epochs = budget.steps_at(point.batch)
    return dataclasses.replace(
        point,
        test_losses_at_epochs=after(TESTED, epochs),
        test_losses_at_steps=after(TESTED, budget.steps),
        train_losses_at_epochs=after("train", epochs),
        train_losses_at_steps=after("train", budget.steps),
    )
