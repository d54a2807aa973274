"""Noise from micro-batches of plain accumulation: gradients as autograd adds them into `.grad`, with any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.base.numerals import counted
from pybatch.noise.closures import Evaluations
from pybatch.noise.handle import Accumulation, Collector, Count, Examples, combine, trainable
from pybatch.noise.norms import SMALL, Places, square, squares, stored
from pybatch.noise.preconditioner import Preconditioner
from pybatch.records import Note

HELD_BYTES = 64 << 20  # of micro-batch gradients kept until their norms are taken together: one launch for many
MISSING = "no pair of norms: a step needs two or more backward passes before optimizer.step()"


class MicroBatchNoise(Collector):
    """Pairs from the gradients of the backward passes before a step, and from their accumulated mean.

    A hook on each parameter sees the micro-batch's own gradient before it is added to `.grad`; at the end of the
    backward pass the norms are taken, so that clipping afterwards does not reach them. A step counts when the
    optimizer takes it; of the passes in a closure of its own, those of the first evaluation.

    Args:
        every: steps from one that is measured to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: bool = False,
        preconditioned: bool = False,
        examples: Examples = None,
        accumulation: Accumulation = "mean",
        scaler: Any = None,
        unit: str | None = None,
        every: int | None = None,
        notes: tuple[Note, ...] = (),
    ) -> None:
        self._every = 1 if every is None else every
        if self._every < 1:
            raise UsageError(f"every {every}: give the steps from one that is measured to the next, 1 or more.")
        named = dict(trainable(model))
        if not named:
            raise UsageError("attach(): the model has no parameter to train, so there is no gradient to measure.")
        if not {p for group in optimizer.param_groups for p in group["params"]}.intersection(named.values()):
            raise UsageError("attach(): the optimizer holds no parameter of this model. Pass its own.")
        self._params = list(named.values())
        names = tuple(named) if layers else ()
        super().__init__(
            "micro-batches",
            model,
            self._params[0].device,
            layers=names,
            preconditioned=preconditioned,
            unit=unit,
            missing=MISSING,
            notes=notes,
            every=self._every,
        )
        self._steps = 0
        self._precondition = Preconditioner(optimizer) if preconditioned else None
        self._accumulation, self._scaler = accumulation, scaler
        # Of a small model on the CPU norms are taken as numbers: nothing is waited for, and a dozen operations saved.
        self._light = (
            not preconditioned
            and scaler is None
            and self._device.type == "cpu"
            and sum(p.numel() for p in self._params) <= SMALL
            and {p.dtype for p in self._params}
            in ({torch.float32}, {torch.float64})  # others NumPy lacks, or squares overflow
        )
        self._places = Places(self._device)
        self._smallest = min(range(len(self._params)), key=lambda i: self._params[i].numel() or math.inf)
        self._counter = Count(model, examples, started=self._recover)
        self._evaluations = Evaluations(optimizer, self.close, self._drop, self._hold)
        self._held: list[tuple[int, torch.Tensor]] = []
        self._held_bytes = 0
        self._taken: list[tuple[int, torch.Tensor]] = []  # squared norms of large gradients, which have a launch each
        self._in_backward = False
        self.pairs = self.singles = 0  # steps of two or more backward passes, and of one
        self._several = 0  # backward passes after more than one counted forward pass
        self._fresh: set[int] = set()  # parameters whose `.grad` was None before this backward pass
        self._left: list[tuple[int, tuple[int, int]]] = []  # parameters and what `mark` said after the last pass
        self._altered = torch.zeros((), dtype=torch.float64, device=self._device)  # steps left out for it
        # Of this backward pass: [2, parameters], plain and preconditioned; of a small model [1 + layers], or a number.
        self._own = self._zeros()
        self.forget()
        self._seeing: list[Callable[[], None]] = []  # hooks on the parameters
        self._ended = False  # detached, if within a step whose end is still told
        self._removals = [self._end_seeing, self._evaluations.remove, self._counter.remove]
        self._follow()

    def _zeros(self) -> Any:
        if self._light:
            layers = self._accumulator.layers
            return np.zeros(1 + len(layers)) if layers else 0.0
        return torch.zeros((2, len(self._params)), dtype=torch.float64, device=self._device)

    def forget(self) -> None:
        """Leave out the micro-batches since the last step."""
        self._members, self._inverse, self._examples = 0, 0.0, 0.0
        self._squares, self._large = self._zeros(), self._zeros()
        self._print: Any = None  # what `_printed` said after the last pass
        self._doubt: torch.Tensor | None = None  # NaN where the step began with gradients of unknown origin
        self._before: tuple[Any, ...] | None = None  # the passes before a closure, until they are known to go on in it
        self._cleared = False  # whether the closure cleared their gradients

    def _hold(self) -> bool:
        """A step with a closure begins; passes before it are complete only if its first evaluation clears them."""
        if self._members:
            self._before = (self._members, self._inverse, self._examples, self._squares, self._large, self._doubt)
        return False

    def _take_back(self) -> None:
        """The closure began anew, at other parameters or over the same examples: the passes before it are the step."""
        before = self._before
        self._drop()
        assert before is not None
        self._members, self._inverse, self._examples, self._squares, self._large, self._doubt = before
        self._evaluations.again()

    @property
    def watching(self) -> bool:
        """Whether the step under way is one of those that are measured."""
        return self._steps % self._every == 0

    def _follow(self) -> None:
        """Hooks on parameters, of which each costs in every pass, are on in those steps alone that are measured."""
        if not self.watching or self._ended:
            self._see_no_more()
        elif not self._seeing:
            self._seeing = [p.register_hook(self._watch(i)).remove for i, p in enumerate(self._params)]  # type: ignore[no-untyped-call]

    def _end_seeing(self) -> None:
        self._ended = True
        self._see_no_more()

    def _see_no_more(self) -> None:
        for remove in self._seeing:
            remove()
        self._seeing = []

    def _drop(self) -> bool:
        self.forget()
        return self._counter is not None and self._counter.forget()

    def _recover(self) -> None:
        """A backward pass that raised, out of memory say, never came to its end: what it left is let go."""
        self._refuse_changed(frozen=False)
        if self._in_backward and torch._C._current_graph_task_id() < 0:
            self._in_backward = False
            self._held, self._held_bytes, self._taken = [], 0, []

    def _watch(self, index: int) -> Any:
        param = self._params[index]

        def see(grad: torch.Tensor) -> None:
            if self._evaluations.later:
                return
            if not self._in_backward:
                self._begin()
            if param.grad is None:
                self._fresh.add(index)  # becomes `.grad` itself: holding it would force a copy
                return
            if self._precondition is None:
                grad = stored(grad)
            if grad.numel() > SMALL and self._precondition is None:
                self._taken.append((index, square(grad, self._scaled)))  # held, its memory would be missed
                return
            self._held.append((index, grad))
            self._held_bytes += grad.numel() * grad.element_size()
            if self._held_bytes > HELD_BYTES:
                self._flush()

        return see

    def _begin(self) -> None:
        """The first gradient of a backward pass is there; none was added to `.grad` yet."""
        self._in_backward = True
        self._own, self._fresh = self._zeros(), set()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        grads = [grad for p in self._params if (grad := p.grad) is not None]
        if not grads:
            return
        changed = any(mark(self._params[i]) not in (None, before) for i, before in self._left)
        if self._members and not changed and self._print is not None:
            changed = self._moved(self._print)
        if changed if self._members else grads:
            # Zeros begin a step; gradients of the step before, or clipped ones, are no sum of this step's passes.
            if self._members:
                self._abandon()
            with torch.no_grad():
                left = squares(grads).sum()
            self._altered = self._altered + (left != 0.0)
            self._doubt = torch.where(left == 0.0, 1.0, torch.nan).double()

    def _moved(self, before: Any) -> bool:
        """Whether gradients were changed through `.data`, which leaves no mark; on a GPU the step is put in doubt."""
        now = self._printed()
        if isinstance(before, float) or now is None:
            return bool(now != before)
        with torch.no_grad():
            doubt = torch.ones_like(before) if self._doubt is None else self._doubt
            self._altered = self._altered + ((now != before) & ~doubt.isnan())
            self._doubt = torch.where(now == before, doubt, torch.nan)
        return False

    def _printed(self) -> Any:
        """The squared norm of the smallest gradient, a number or on the device; None where it has none."""
        grad = self._params[self._smallest].grad
        if grad is None:
            return None
        if not self._light:
            return square(grad)
        wide = stored(grad.detach()).reshape(-1).numpy(force=True)
        return float(wide.dot(wide))

    def _flush(self) -> None:
        if self._held:
            self._own = self._add(self._own, [i for i, _ in self._held], [grad for _, grad in self._held])
            self._held, self._held_bytes = [], 0
        if self._taken:
            self._own[0, self._places([i for i, _ in self._taken])] += torch.stack([norm for _, norm in self._taken])
            self._taken = []

    def _add(self, sums: Any, index: list[int], grads: list[torch.Tensor]) -> Any:
        """The sums with the squared norms of the gradients of these parameters added to them."""
        if not self._light:
            sums[:, self._places(index)] += self._norms(index, grads)
            return sums
        grads = [stored(grad) for grad in grads]
        flat = torch._utils._flatten_dense_tensors(grads)  # type: ignore[no-untyped-call]
        wide = flat.numpy(force=True).astype(np.float64)
        if not self._accumulator.layers:
            return sums + float(wide.dot(wide))
        found = np.zeros(len(sums))
        found[0] = wide.dot(wide)
        sizes = np.array([grad.numel() for grad in grads])
        some = sizes > 0  # a sparse one may have no row
        if some.any():
            found[1 + np.array(index)[some]] = np.add.reduceat(wide * wide, np.cumsum([0, *sizes[some][:-1]]))
        return sums + found

    def _norms(self, index: list[int], grads: list[torch.Tensor]) -> torch.Tensor:
        """[2, len(index)]: squared norms, plain and preconditioned; NaN where there is no preconditioner yet."""
        plain = squares(grads, self._scaled)
        if self._precondition is None:
            return torch.stack([plain, torch.zeros_like(plain)])
        given = zip(index, grads, strict=True)
        return torch.stack(
            [plain, torch.stack([self._precondition(self._params[i], g, self._scaled) for i, g in given])]
        )

    def _end(self) -> None:
        """The backward pass is over: close the micro-batch."""
        if torch.is_grad_enabled():  # one that makes a graph; entering no_grad takes as long as the rest of this
            with torch.no_grad():
                self._close_pass()
        else:
            self._close_pass()

    def _close_pass(self) -> None:
        self._in_backward = False
        self._flush()
        present = [i for i, p in enumerate(self._params) if p.grad is not None]
        grads = [g for p in self._params if (g := p.grad) is not None]
        marks = [(i, now) for i in present if (now := mark(self._params[i])) is not None]
        if not present or (self._members and marks == self._left):
            return  # torch.autograd.grad(): nothing was accumulated
        sizes = self._counter.take() if self._counter is not None else []
        if self._members and self._fresh.issuperset(present):
            self._abandon()
        if not sizes:
            raise UsageError(
                "no examples were counted for this backward pass: the attached model's forward() was not called. "
                "Attach to the model that is called (the compiled one, say), or with examples='count' and call "
                "handle.count(n) before each backward()."
            )
        self._large = self._add(self._zeros(), present, grads)
        fresh = [i for i in present if i in self._fresh]
        if len(fresh) == len(present):
            self._own = self._own + self._large
        elif fresh:
            own = [g for i in fresh if (g := self._params[i].grad) is not None]
            self._own = self._add(self._own, fresh, own)
        size = sizes[-1]
        self._several += len(sizes) > 1
        self._squares = self._squares + (self._own / size if self._accumulation == "weighted" else self._own)
        self._members += 1
        self._inverse += 1.0 / size
        self._examples += size
        self._left, self._print = marks, self._printed()

    def _abandon(self) -> None:
        """Gradients were cleared without a step; under a scaler because they were not finite."""
        before = self._before
        if self._scaler is not None and before is None:
            self._skip()
        self.forget()
        self._before, self._cleared = before, before is not None

    def close(self, scale: float = 1.0) -> bool:
        """The passes of a step are complete: keep their pair; returns whether there were any.

        Args:
            scale: the gradients are so many times those of the step.
        """
        if not self.watching:
            some = self._counter is not None and self._counter.forget()
            self._steps += some
            self._follow()
            return some
        if self._before is not None and self._cleared:
            self._take_back()
        k = self._members
        self._steps += k > 0
        if k:
            self.pairs += k > 1
            self.singles += k == 1
            weighted = self._accumulation == "weighted"
            sums = self._squares if self._accumulation == "sum" else self._squares * (k * k)
            large = self._large / (k * k) if self._accumulation == "sum" else self._large
            if scale != 1.0:
                sums, large = sums / scale**2, large / scale**2
            small, n_small, n_large = combine(weighted, k, sums, self._examples if weighted else self._inverse)
            if self._scaler is not None:
                factor = self._scaler.scale(torch.ones((), device=self._device)).double() ** -2
                small, large = small * factor, large * factor
            if self._doubt is not None:
                small = small * (float(self._doubt) if self._light else self._doubt)
            self._row(n_small, n_large, self._arrange(small), self._arrange(large))
        self.forget()
        self._follow()
        return k > 0

    def _arrange(self, norms: Any) -> Any:
        """[2, parameters] to [series]."""
        if self._light:
            return norms
        totals = norms.sum(dim=1)
        layers = norms[0] if self._accumulator.layers else norms[0, :0]
        return torch.cat([totals[: 2 if self._precondition else 1], layers])

    def _settle(self) -> None:
        """A step is a row at once."""

    def _said(self) -> tuple[Note, ...]:
        notes, altered = list(self._notes), round(float(self._altered))
        if self._every > 1:
            notes.append(Note("noise.steps", f"one step in {self._every} is measured"))
        if self._several:
            text = (
                f"{self._several} backward passes came after several forward passes, and the examples of the last "
                "alone were counted: where a loss holds them all, attach with examples='count'"
            )
            notes.append(Note("noise.b_simple", text))
        if altered:
            text = (
                f"left out: {counted(altered, 'step')}, because gradients were left from the step before, or changed "
                "between backward passes: clear those of the whole model after every step, and clip once, right "
                "before it"
            )
            notes.append(Note("noise.skipped", text))
        return tuple(notes)


def mark(param: torch.Tensor) -> tuple[int, int] | None:
    """What changes when a gradient is written in place or replaced; None where there is none."""
    if param.grad is None:
        return None
    numbers = param.grad._values() if param.grad.is_sparse else param.grad
    return numbers.data_ptr(), param.grad._version
