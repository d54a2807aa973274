"""Gradients added up over micro-batches: the private sums, and collecting them while backward() runs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine.slots import Slot, addresses, fit_sum, own_storage
from pybatch.optim._engine.tables import Gradients, Tables

BUCKET_BYTES = 64 << 20  # gradients that wait while backward() runs: a pass over them still fills the memory bus


class Sums:
    """The fp32 sums of one step, by slot, and what they are sums of."""

    def __init__(self, slots: int = 0) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * slots
        self._own: dict[int, torch.Tensor] = {}  # those that are no gradients, kept in their places from step to step
        self.micro_batches, self.examples = 0, 0.0
        self._first = 1.0  # examples of the first micro-batch, whose weight is 1

    @property
    def under_way(self) -> bool:
        """Whether a micro-batch was added since the last step."""
        return self.micro_batches > 0

    @property
    def inverse(self) -> float:
        """Factor from the sum to the mean over all examples."""
        return self._first / self.examples

    def emptied(self, slots: int) -> Sums:
        """For the next step; where this one was not accumulated, no memory is kept."""
        empty = Sums(slots)
        if self.under_way:
            empty._own = self._own
        return empty

    def moved(self, before: Tables | None, after: Tables) -> list[torch.Tensor | None]:
        """The sums in the order of new tables; raises UsageError where a parameter was resized."""
        own = {} if before is None else dict(zip(before.params, self.tensors, strict=True))
        self._own = {}
        return [fit_sum(slot, own.get(slot.param)) for slot in after.slots]

    def weight(self, n: float) -> float:
        """Factor of a gradient over n examples."""
        if not self.under_way:
            self._first = n
        return n / self._first

    def count(self, n: float) -> None:
        """A micro-batch of n examples is in."""
        self.examples += n
        self.micro_batches += 1

    def give(self, slots: list[Slot], found: Gradients) -> list[int]:
        """A sum for every gradient; 1 where it is new. The first fp32 gradient itself becomes the sum: no copy."""
        given = [int(place) for place in found.addresses if place > 1]
        reused = set(given).intersection(addresses(self.tensors))
        if reused:
            slot = slots[next(i for i, place in enumerate(found.addresses) if int(place) in reused)]
            raise UsageError(
                f"accumulate(): the gradient of {slot.what} is in the same memory as one accumulated before, which "
                "was consumed. Set p.grad to a clone() of your buffer."
            )
        unshared = len(set(given)) == len(given)
        fresh = [0] * len(slots)
        for i in np.flatnonzero(found.addresses).tolist():
            if self.tensors[i] is None:
                grad = found.copies.get(i, slots[i].param.grad)
                assert grad is not None
                usable = unshared and not slots[i].sharded and grad.dtype == torch.float32 and own_storage(grad)
                if not usable and i not in self._own:
                    self._own[i] = ops.empty_like(slots[i].dense, torch.float32)
                self.tensors[i] = grad if usable else self._own[i]
                fresh[i] = 1
        return fresh


def add(sums: Sums, tables: Tables, found: Gradients, call: Any, n: float, *, partly: bool) -> None:
    """One pass that adds the gradients to the sums, and takes the norms of both; the gradients are consumed.

    Args:
        sums, tables, found: of the optimizer.
        call: scalars of the pass.
        n: examples of the micro-batch.
        partly: only some of the gradients are there; the others' sums are not read, and `close` must follow.
    """
    fresh = sums.give(tables.slots, found)
    columns: dict[str, ArrayLike] = {
        "grad": found.addresses,
        "grad_type": found.codes,
        "sum": addresses(sums.tensors),
        "fresh": fresh,
    }
    call.weight, call.examples = sums.weight(n), n
    rows = np.flatnonzero(found.addresses)
    tensors = tables.part(rows) if partly else tables.first
    for name, values in columns.items():
        tensors.set(name, np.asarray(values)[rows] if partly else values)
    tables.backend.accumulate(tensors, call)
    if partly:
        tables.first.take_over(tensors, rows.tolist())
    for i in rows:
        tables.params[i].grad = None


def close(sums: Sums, tables: Tables) -> None:
    """After a micro-batch that was added partly: the norm of all sums is that of its parts."""
    tables.first.sum_up([i for i, total in enumerate(sums.tensors) if total is not None])


class Collector:
    """Hands gradients over as backward() produces them, whenever a bucket of them waits.

    Args:
        params: the optimizer's parameters.
        flush: adds every gradient that is there.
    """

    def __init__(self, params: list[torch.Tensor], flush: Callable[[], None]) -> None:
        self._flush, self._waiting = flush, 0
        self._seen: set[torch.Tensor] = set()
        self._taken: set[torch.Tensor] = set()  # of them, those that were handed over
        self._index = {param: i for i, param in enumerate(params)}
        me = weakref.ref(self)

        def ready(param: torch.Tensor) -> None:
            collector = me()
            if collector is not None:
                collector._add(param)

        # torch's own function has no types.
        self._handles: list[Any] = [
            param.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]
            for param in params
            if param.requires_grad
        ]

    def _add(self, param: torch.Tensor) -> None:
        if param in self._seen:
            raise UsageError(
                f"accumulating(): parameter {self._index[param]} of shape {tuple(param.shape)} got its gradient in two "
                "parts, as with reentrant checkpointing or two backward() calls, so a micro-batch has no norm. Call "
                "accumulate(n) after backward() instead."
            )
        self._seen.add(param)
        grad = param.grad
        self._waiting += 0 if grad is None else grad.numel() * grad.element_size()
        if self._waiting >= BUCKET_BYTES:
            self._waiting = 0
            self._taken |= self._seen
            self._flush()

    def finish(self) -> None:
        """Hand over what is left.

        Raises:
            UsageError: a gradient was written again after it was handed over.
        """
        for param in self._taken:
            if param.grad is not None:
                raise UsageError(
                    f"accumulating(): the gradient of parameter {self._index[param]} of shape {tuple(param.shape)} was "
                    "written again after it was taken, as DistributedDataParallel does when its all-reduce is done. "
                    "Call accumulate(n) after backward(), or use its no_sync()."
                )
        self._flush()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()


def check_empty(params: list[torch.Tensor]) -> None:
    """Raise UsageError where a gradient is left from before."""
    for index, param in enumerate(params):
        if param.grad is not None:
            raise UsageError(
                f"accumulating(): parameter {index} of shape {tuple(param.shape)} has a gradient already. Call "
                "accumulate(n) or zero_grad() before."
            )


def prepare(call: Any, sums: Sums, limit: float | None, noise: bool) -> None:
    """Fill in what a step's call takes from the sums and the options."""
    accumulated = sums.under_way
    call.sum = call.known = accumulated
    call.clip = limit is not None
    call.norm = not accumulated and (limit is not None or noise)
    call.max_norm = math.inf if limit is None else limit
    call.noise = noise and sums.micro_batches > 1
    call.inverse = sums.inverse if accumulated else 1.0
    call.examples, call.micro_batches = float(sums.examples), float(sums.micro_batches)
