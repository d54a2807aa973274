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
        hold: called in place of `close` where a step with a closure begins, as the closure may run the last of its
            micro-batches (Lightning's does): returns True where its passes are complete. None: `close`.
        drop: forgets what came of a later evaluation, or of one that raised; returns whether anything was counted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        close: Callable[[], bool] = lambda: False,
        drop: Callable[[], bool] = lambda: False,
        hold: Callable[[], bool] | None = None,
    ) -> None:
        self._close, self._drop, self._hold = close, drop, hold or close
        self._steps = 0
        self._open = False  # whether a step is under way whose passes may not be complete
        self.later = False  # whether a later evaluation is under way
        self.remove: Callable[[], None] = lambda: None
        if optimizer is not None:
            removals = [
                optimizer.register_step_pre_hook(self._begin).remove,
                optimizer.register_step_post_hook(self._end).remove,
            ]
            self.remove = lambda: [remove() for remove in removals]  # type: ignore[assignment]

    def again(self) -> None:
        """A step evaluated the model again, which was left out."""
        self._steps += 1

    def _end(self, *_: Any) -> None:
        """A step is over: it may never have called its closure."""
        if self._open:
            self._open = False
            self._close()

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step begins; `args` starts with the optimizer."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._close()
            return None
        measured, said = self._hold(), False
        self._open = not measured

        def evaluate(*own: Any, **options: Any) -> Any:
            nonlocal measured, said
            if not measured:
                try:
                    found = closure(*own, **options)
                except BaseException:
                    self._open = False
                    self._drop()  # some of its passes are missing
                    raise
                self._open, measured = False, self._close()
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
