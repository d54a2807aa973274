"""Noise from exact per-example gradient norms of a training's own passes: one backward pass a step is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pybatch.base.errors import UsageError
from pybatch.noise.closures import Evaluations
from pybatch.noise.handle import Accumulation, Collector, Count, Examples
from pybatch.noise.hooks import after_forward, before_forward
from pybatch.noise.per_example.one_pass import Pass
from pybatch.noise.per_example.recorder import ExampleNorms, ExampleRecorder, fill
from pybatch.records import Note

EVERY = (
    10  # steps between those that are watched, where that is not chosen: a watched pass takes 1.1 to 3 times a plain
)
MISSING = "no pair of norms: no backward pass followed a watched forward pass of two or more examples"
MEAN = Note(
    "noise.b_simple",
    "of exact per-example gradients: the loss was taken for a mean over the examples of a batch, none of which enters "
    "another's (no contrastive loss, no mean over tokens where their numbers differ)",
)


class _Yielding(Pass):
    """A pass whose first refusal ends the watch, in place of the training it is part of."""

    refused: UsageError | None = None
    began: Callable[[], None] = staticmethod(lambda: None)
    left = False

    def leave(self) -> None:
        """The forward pass is over. Torch would pop whichever mode is on top: only its own."""
        self.left = True
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if stack and stack[-1] is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.open or self.left:  # what the training itself refuses is not run twice
            return func(*args, **(kwargs or {}))
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except UsageError as error:
            self._give_up(error)
            return func(*args, **(kwargs or {}))

    def _arrived(self, *args: Any, **kwargs: Any) -> None:
        self._try(super()._arrived, *args, **kwargs)

    def _complete(self, *args: Any) -> None:
        self._try(super()._complete, *args)

    def _leaf(self, *args: Any) -> None:
        if self.open:
            self.began()
        self._try(super()._leaf, *args)

    def _try(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except UsageError as error:
            self._give_up(error)

    def _give_up(self, error: UsageError) -> None:
        self.refused, self.open = self.refused or error, False


@contextmanager
def _closed(watch: _Yielding) -> Iterator[None]:
    before, watch.open = watch.open, False
    try:
        yield
    finally:
        watch.open = before


class ExampleNoise(Collector):
    """Pairs from the norms of every example's gradient and of their mean, in the passes of every so many steps.

    Each pass gives a pair by itself; those of one step are averaged. Parameters are watched where the model's forward()
    meets them, by `per_example.ExampleRecorder`, which refuses what it can't measure.

    Args:
        every: steps from one that is watched to the next.
        yielding: what can't be measured ends the watch, and `refused` tells why; else it is an error of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: bool = False,
        examples: Examples = None,
        accumulation: Accumulation = "mean",
        scaler: Any = None,
        unit: str | None = None,
        every: int | None = None,
        yielding: bool = False,
        notes: tuple[Note, ...] = (),
    ) -> None:
        if examples == "count":
            raise UsageError(
                "source 'per-example' with examples='count': how many examples a pass has must be known in forward(). "
                "Leave it out, or give a number."
            )
        self._every = EVERY if every is None else every
        if self._every < 1:
            raise UsageError(f"every {every}: give the steps from one that is watched to the next, 1 or more.")
        self._recorder = ExampleRecorder(model)
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(
            "per-example",
            model,
            next(p.device for p in model.parameters() if p.requires_grad),
            layers=tuple(self._names) if layers else (),
            unit=unit,
            missing=MISSING,
            notes=(MEAN, *notes),
            every=self._every,
        )
        self._accumulation, self._scaler, self._yielding = accumulation, scaler, yielding
        self.refused: UsageError | None = None
        self._counter = Count(model, examples)
        self._loss.aside = self._aside
        self._counted = 0  # forward passes of this step that were counted
        self._steps = 0
        self._watch: _Yielding | None = None
        self._found: list[tuple[int, Tensor, Tensor]] = []  # per pass of this step: examples, sums, squared means
        self._evaluations = Evaluations(optimizer, self._close, self._drop)
        self._removals = [
            before_forward(model, self._enter).remove,
            after_forward(model, self._leave, always_call=True).remove,
            self._evaluations.remove,
            self._counter.remove,
        ]

    @property
    def watching(self) -> bool:
        """Whether a pass of the step under way is one of those that are watched."""
        return self._watch is not None or bool(self._found)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin(module, args, kwargs)
        self._enter(module, args)

    def _enter(self, module: nn.Module, _: Any) -> None:
        assert self._counter is not None
        if self._counter.pending == self._counted:
            return  # evaluation, or no gradients
        self._counted = self._counter.pending
        if self._steps % self._every or self._evaluations.later or self.refused is not None:
            return
        self._refuse_changed(frozen=True)
        if (stale := self._watch) is not None:
            self._leave()  # Ctrl-C in a forward pass skips torch's hooks at its end
            stale.close()  # a forward pass without a backward pass
        n = round(self._counter.sizes[-1])
        watch = self._recorder.watch(n, _Yielding)
        assert isinstance(watch, _Yielding)
        self._watch = watch
        began = False

        def begin() -> None:
            nonlocal began
            if not began:
                began = True
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._take_pass(watch, n))

        watch.began = begin
        watch.__enter__()  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        self._leave()
        super().detach()

    def _aside(self) -> AbstractContextManager[None]:
        """In it the watched pass does not see what goes through its outputs."""
        return nullcontext() if self._watch is None else _closed(self._watch)

    def _leave(self, *_: Any) -> None:
        """The forward pass is over, or failed."""
        watch = self._watch
        if watch is not None and not watch.left:
            watch.leave()
            self._check(watch)

    def _check(self, watch: _Yielding) -> bool:
        error = watch.refused
        if error is None:
            return True
        watch.unhook()
        self.refused, self._watch = error, None
        if not self._yielding:
            raise error
        return False

    @torch.no_grad()
    def _take_pass(self, watch: _Yielding, n: int) -> None:
        """The backward pass is over."""
        if self._watch is not watch or not self._check(watch):
            return
        self._watch = None
        watch.close()
        norms = ExampleNorms({}, {}, torch.ones(n, dtype=torch.float64))
        fill(norms, watch, n)
        self._recorder.seen(n)
        small = torch.stack([norms.by_parameter[name].mean() for name in self._names])
        self._found.append((n, small, torch.stack([norms.mean_sq[name] for name in self._names])))

    def _drop(self) -> bool:
        self._found, self._counted = [], 0
        return self._counter is not None and self._counter.forget()

    @torch.no_grad()
    def _close(self) -> bool:
        """A step: what its passes found is one row."""
        found, sizes = self._found, self._counter.sizes if self._counter is not None else []
        if found:
            total, k = sum(sizes), len(sizes)
            factors = {
                "mean": [float(k)] * len(found),
                "sum": [1.0] * len(found),
                "weighted": [total / n for n, _, _ in found],
            }[self._accumulation]
            small = torch.stack([own * by**2 for (_, own, _), by in zip(found, factors, strict=True)]).mean(0)
            large = torch.stack([own * by**2 for (_, _, own), by in zip(found, factors, strict=True)]).mean(0)
            if self._scaler is not None:
                scale = self._scaler.scale(torch.ones((), device=self._device)).double() ** -2
                small, large = small * scale, large * scale
            n_large = len(found) / sum(1.0 / n for n, _, _ in found)
            self._row(1.0, n_large, self._arrange(small), self._arrange(large))
        some = bool(sizes)
        self._steps += some
        self._drop()
        return some

    def _arrange(self, norms: Tensor) -> Tensor:
        return torch.cat([norms.sum().reshape(1), norms if self._accumulator.layers else norms[:0]])

    def _settle(self) -> None:
        """A step is a row at once."""

    def _said(self) -> tuple[Note, ...]:
        notes = list(self._notes)
        if self._every > 1:
            text = f"one step in {self._every} is measured: a smaller `every` reads newer steps, and costs more"
            notes.append(Note("noise.steps", text))
        if self.refused is not None:
            notes.append(Note("noise.b_simple", f"ended: {self.refused}"))
        return tuple(notes)
