"""Optimizers that run backward passes themselves, in `step(closure)`: which of those make a pair of norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pybatch.base.numerals import counted
from pybatch.records import Note


class Evaluations:
    """Tells the first evaluation of a step from later ones over the same examples, which make no pair.

    LBFGS evaluates its closure many times in a step, SAM once more a step uphill. By then the parameters have moved
    along these examples' own gradient, whose norm is no longer an unbiased one (smaller downhill, larger uphill).

    Args:
        optimizer: whose `step` is watched; None: there is nothing to watch.
        close: ends the pair of the passes so far; returns whether there were any since the step before.
        drop: forgets what came of a later evaluation, or of one that raised; returns whether anything was counted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        close: Callable[[], bool] = lambda: False,
        drop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._close, self._drop = close, drop
        self._steps = 0
        self.later = False  # whether a later evaluation is under way
        self.remove: Callable[[], None] = lambda: None
        if optimizer is not None:
            self.remove = optimizer.register_step_pre_hook(self._begin).remove

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step begins; `args` starts with the optimizer."""
        measured = self._close()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return None
        said = False

        def evaluate(*own: Any, **options: Any) -> Any:
            nonlocal measured, said
            if not measured:
                try:
                    found = closure(*own, **options)
                except BaseException:
                    self._drop()  # some of its passes are missing
                    raise
                measured = self._close()
                return found
            self.later = True
            try:
                return closure(*own, **options)
            finally:
                self.later = False
                if self._drop() and not said:
                    said = True
                    self._steps += 1

        return ((args[0], evaluate, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": evaluate})

    @property
    def notes(self) -> tuple[Note, ...]:
        """What a reader must know of the passes that were left out."""
        if not self._steps:
            return ()
        text = (
            f"{counted(self._steps, 'step')} of the optimizer evaluated the model again over the same examples, at "
            "parameters moved along their own gradient: the first evaluation of a step alone is measured"
        )
        return (Note("noise.steps", text),)
