"""Noise from DistributedDataParallel: each process's own gradient before the all-reduce, their mean after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pybatch.base.errors import UsageError
from pybatch.noise.closures import Evaluations
from pybatch.noise.handle import Accumulation, Collector, Count, Examples, combine, local_batch, trainable
from pybatch.noise.norms import Places, square, squares
from pybatch.noise.preconditioner import Preconditioner
from pybatch.records import Note

MISSING = "no pair of norms: no backward pass of two or more processes was synchronized"

Hook = Callable[[Any, GradBucket], Future[torch.Tensor]]

# DDP takes one communication hook for its lifetime, so the first handle's hook stays and serves later ones.
_relays: weakref.WeakKeyDictionary[DistributedDataParallel, _Relay] = weakref.WeakKeyDictionary()


class _Relay:
    """The hook DDP calls: the user's own, or the plain mean; and the handle that listens now."""

    def __init__(self, model: DistributedDataParallel, hook: Hook | None, state: Any) -> None:
        self.hook, self.state = hook or allreduce_hook, model.process_group if hook is None else state
        self.handle: DDPNoise | None = None


# DDP wants a plain function, and compares its annotations with the classes themselves, not their names.
def _listen(relay, bucket):  # type: ignore[no-untyped-def]
    handle = relay.handle
    if handle is None:
        return relay.hook(relay.state, bucket)
    keep = handle.before(bucket)
    future = relay.hook(relay.state, bucket)
    if bucket.is_last():
        handle.exchange()
    return future.then(lambda done: keep(done.value()))


class DDPNoise(Collector):
    """Pairs from every synchronized backward pass: the processes' gradients, and their mean.

    Under `no_sync` the small batch is what a process accumulated since the last synchronization. One extra all-reduce
    of a few numbers per step carries the mean of the local norms. The mean's norm is that of the reduced bucket.

    With an optimizer, backward passes that synchronize again before its step are left out and counted: their local
    gradient holds the mean of the earlier one already.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        layers: bool = False,
        preconditioned: bool = False,
        examples: Examples = None,
        accumulation: Accumulation = "mean",
        scaler: Any = None,
        unit: str | None = None,
        hook: Hook | None = None,
        hook_state: Any = None,
        notes: tuple[Note, ...] = (),
    ) -> None:
        named = dict(trainable(model))
        if preconditioned and optimizer is None:
            raise UsageError("preconditioned=True needs the optimizer. Pass attach(model, optimizer, ...).")
        precondition = Preconditioner(optimizer) if preconditioned and optimizer is not None else None
        relay = _relays.get(model)
        if relay is None:
            relay = _Relay(model, hook, hook_state)
            try:
                model.register_comm_hook(relay, _listen)
            except RuntimeError as error:
                raise UsageError(
                    f"attach(): the DDP model takes no further communication hook ({error}). Leave your "
                    "register_comm_hook() out and pass attach(..., hook=your_hook, hook_state=its_state)."
                ) from None
            _relays[model] = relay
        elif relay.handle is not None:
            raise UsageError("attach(): a handle is attached to this DDP model already. Call its detach() first.")
        elif hook is not None and (hook, hook_state) != (relay.hook, relay.state):
            raise UsageError(
                "attach(): DDP keeps the communication hook of the first attach() for its lifetime. Pass the same one."
            )
        super().__init__(
            "ddp",
            model,
            next(iter(named.values())).device,
            layers=tuple(named) if layers else (),
            preconditioned=preconditioned,
            unit=unit,
            missing=MISSING,
            notes=notes,
        )
        self._relay, self._group = relay, model.process_group
        self._precondition, self._accumulation, self._scaler = precondition, accumulation, scaler
        first = 1 + preconditioned
        self._column: dict[torch.Tensor, int] = (
            {param: first + i for i, param in enumerate(named.values())} if layers else {}
        )
        self._places = Places(self._device)
        self._params = list(named.values())
        self._counter = Count(model, examples, started=self._began)
        # A step's first evaluation synchronizes once, and is settled when the next one does.
        self._evaluations = Evaluations(optimizer, lambda: self._rounds > 0, self._counter.forget)
        self._small = self._zeros()
        self._large: list[torch.Tensor] = []  # of each bucket; their callbacks may run in several threads
        self._waiting: tuple[dist.Work, torch.Tensor] | None = None  # the step's sums over processes, under way
        self._factor = 1.0
        self._unscale: torch.Tensor | float = 1.0
        self._in_round = False
        self._rounds = self._repeated = 0
        self._removals = [self._counter.remove, self._leave, self._evaluations.remove]
        if optimizer is not None:
            self._removals.append(optimizer.register_step_post_hook(self._stepped).remove)
        self._watched = optimizer is not None
        relay.handle = self

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._series, dtype=torch.float64, device=self._device)

    def _leave(self) -> None:
        self._relay.handle = None

    def _stepped(self, *_: Any) -> None:
        self._rounds = 0

    @torch.no_grad()
    def _began(self) -> None:
        """A forward pass. Gradients cleared since the last synchronization: its step was left out, as by a GradScaler.

        Zeros are looked at, which waits for the device, only where a step was left out or synchronizes again.
        """
        if self._rounds and self._watched:
            left = [grad for param in self._params if (grad := param.grad) is not None]
            if not left or not bool(squares(left).any()):
                self._rounds = 0

    # Called by the relay, in backward.

    @torch.no_grad()
    def before(self, bucket: GradBucket) -> Callable[[torch.Tensor], torch.Tensor]:
        """Take the local norms of a bucket; returns what takes those of the mean, and passes it on."""
        if not self._in_round:
            self._settle()
            self._small, self._large = self._zeros(), []
            self._in_round = True
        params, views = bucket.parameters(), bucket.gradients()
        self._small += self._norms(params, views, bucket.buffer())
        width = bucket.buffer().element_size()
        starts = [(view.data_ptr() - bucket.buffer().data_ptr()) // width for view in views]
        parts = self._large

        @torch.no_grad()
        def after(mean: Any) -> torch.Tensor:
            buffer: torch.Tensor = mean[0] if isinstance(mean, list | tuple) else mean
            means = [buffer.flatten()[s : s + v.numel()] for s, v in zip(starts, views, strict=True)]
            means = [m.view_as(v) for m, v in zip(means, views, strict=True)]
            parts.append(self._norms(params, means, buffer))
            return buffer

        return after

    @torch.no_grad()
    def exchange(self) -> None:
        """After a step's last bucket: send the sums over processes on their way."""
        self._in_round = False
        # A later evaluation's are sent too, of no use: a process that only keeps company (below) can't know of it.
        later = self._evaluations.later
        sizes = self._counter.take() if self._counter is not None and not later else []
        self._rounds += not later
        again = self._watched and self._rounds > 1 and not later
        self._repeated += again
        # Without a forward pass this process ran out of batches and only keeps the others company (DDP's `join`).
        own = torch.zeros(self._series + 2, dtype=torch.float64, device=self._device)
        if sizes:
            weighted = self._accumulation == "weighted"
            n, self._factor = local_batch(sizes, self._accumulation)
            own[:-2] = self._small * (self._factor**2 / (n if weighted else 1.0))
            own[-2], own[-1] = n if weighted else 1.0 / n, 1.0
        work = dist.all_reduce(own, group=self._group, async_op=True)
        assert work is not None
        self._waiting = None if again or later else (work, own)
        if self._scaler is not None:  # now: the scale of the next step may be another
            self._unscale = self._scaler.scale(torch.ones((), device=self._device)).double() ** -2

    def _norms(self, params: list[torch.Tensor], grads: list[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
        """[series] squared norms of a bucket."""
        found = self._zeros()
        if self._column:
            norms = squares(grads, self._scaled)
            found[0] = norms.sum()
            found[self._places([self._column[param] for param in params])] = norms
        else:
            found[0] = square(buffer, self._scaled)
        if self._precondition is not None:
            given = zip(params, grads, strict=True)
            found[1] = torch.stack([self._precondition(param, grad, self._scaled) for param, grad in given]).sum()
        return found

    def _settle(self) -> None:
        if self._waiting is None:
            return
        work, sums = self._waiting
        self._waiting = None
        work.wait()
        weighted, members = self._accumulation == "weighted", sums[-1]
        small, n_small, n_large = combine(weighted, members, sums[:-2], sums[-2])
        # DDP divides by all processes, also by those without a batch of their own.
        large = torch.stack(self._large).sum(0) * (self._factor * dist.get_world_size(self._group) / members) ** 2
        if self._device.type == "cuda":
            for part in self._large:  # made on the callbacks' streams
                part.record_stream(torch.cuda.current_stream(self._device))
        small, large = small * self._unscale, large * self._unscale
        self._row(n_small, n_large, small, large)

    def _said(self) -> tuple[Note, ...]:
        if not self._repeated:
            return self._notes
        text = (
            f"{self._repeated} backward passes synchronized again before a step were left out: "
            "accumulate under model.no_sync()"
        )
        return (*self._notes, Note("noise.steps", text))
