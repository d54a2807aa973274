"""Noise from FSDP2: the unsharded gradient before each reduce-scatter, the shards of the mean after it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from pybatch.base.errors import UsageError
from pybatch.noise.closures import Evaluations
from pybatch.noise.handle import Accumulation, Collector, Count, Examples, combine, local_batch
from pybatch.noise.norms import Places, square
from pybatch.records import Note

MISSING = "no pair of norms: no backward pass reduced gradients over two or more processes"


_reduce_scatter = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # its name before torch 2.13


class ReduceScatter(Protocol):
    """What `FSDPModule.set_custom_reduce_scatter` takes."""

    def allocate(self, size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for input or output."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Reduce input_tensor over the group and scatter it to output_tensor."""


class _Plain:
    """FSDP2's own way."""

    def allocate(self, size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


class _Listening:
    """A reduce-scatter that tells the handle what goes in and what comes out."""

    def __init__(self, handle: FSDPNoise, index: int, inner: ReduceScatter) -> None:
        self.handle, self.index, self.inner = handle, index, inner

    def allocate(self, size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self.inner.allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        before = self.handle.square(input_tensor)
        work = self.inner(output_tensor, input_tensor, group, op, async_op)
        if work is not None:
            work.wait()
        self.handle.take(self.index, group, op, before, self.handle.square(output_tensor))
        return work


class FSDPNoise(Collector):
    """Pairs from every backward pass whose gradients are reduced: the processes' gradients, and their mean.

    After `set_requires_gradient_sync(False)` the small batch is what a process accumulated since the last reduction.
    One extra all-reduce of a few numbers per step, at the optimizer's step (or at the next forward pass where no
    optimizer was given), carries local norms and the shards' norms. Layers are FSDP's own groups: the parameters of
    one `fully_shard` call. With HSDP the large batch is that of one shard group.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        layers: bool = False,
        preconditioned: bool = False,
        examples: Examples = None,
        accumulation: Accumulation = "mean",
        scaler: Any = None,
        unit: str | None = None,
        hook: ReduceScatter | None = None,
        notes: tuple[Note, ...] = (),
    ) -> None:
        if preconditioned:
            raise UsageError(
                "preconditioned=True: FSDP2 reduces flat buffers, where a gradient no longer meets its moments. "
                "Leave it out, or measure on one process."
            )
        shards = {name or "(root)": m for name, m in model.named_modules() if isinstance(m, FSDPModule)}
        self._names = tuple(shards)
        super().__init__(
            "fsdp",
            model,
            next(model.parameters()).device,
            layers=self._names if layers else (),
            unit=unit,
            missing=MISSING,
            notes=notes,
        )
        self._accumulation, self._scaler = accumulation, scaler
        self._places = Places(self._device)
        self._counter = Count(model, examples, started=self._exchange)
        self._unknown_op = False
        self._unscale: torch.Tensor | float = 1.0
        self._forget()
        self._removals = [self._counter.remove]
        for index, module in enumerate(shards.values()):
            module.set_custom_reduce_scatter(_Listening(self, index, hook or _Plain()))  # type: ignore[arg-type]
            self._removals.append(lambda m=module: m.set_custom_reduce_scatter(hook or _Plain()))  # type: ignore[misc]
        self._evaluations = Evaluations(optimizer, self._exchange, self._drop)
        self._removals.append(self._evaluations.remove)

    def _forget(self) -> None:
        self._norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sizes: list[float] = []
        self._group: dist.ProcessGroup | None = None

    def _drop(self) -> bool:
        self._forget()
        return self._counter is not None and self._counter.forget()

    # Called in backward.

    def square(self, buffer: torch.Tensor) -> torch.Tensor:
        """The squared norm of a buffer of gradients."""
        return square(buffer, self._scaled)

    @torch.no_grad()
    def take(self, index: int, group: dist.ProcessGroup, op: Any, small: torch.Tensor, large: torch.Tensor) -> None:
        """The squared norms of one group of parameters: of its local gradient, and of this process's shard."""
        if self._evaluations.later:
            return
        if index in self._norms:  # another backward pass: its gradients are added to the shards of the first one
            self._exchange()
        if not self._norms:
            self._sizes = self._counter.take() if self._counter is not None else []
            if self._scaler is not None:  # now: the scale of the next step may be another
                self._unscale = self._scaler.scale(torch.ones((), device=self._device)).double() ** -2
        if op == dist.ReduceOp.SUM:
            large = large / group.size() ** 2
        elif op != dist.ReduceOp.AVG:
            large = large * torch.nan
            self._unknown_op = True
        self._norms[index], self._group = (small, large), group

    @torch.no_grad()
    def _exchange(self) -> bool:
        """Every process comes here at the same point of its step: sum over them, and keep the row, if there is one."""
        group, norms, sizes = self._group, self._norms, self._sizes
        self._forget()
        if group is None:
            return False
        own = torch.zeros((2, len(self._names)), dtype=torch.float64, device=self._device)
        own[:, self._places(list(norms))] = torch.stack([torch.stack(pair) for pair in norms.values()], dim=1)
        weighted = self._accumulation == "weighted"
        n, factor = local_batch(sizes, self._accumulation) if sizes else (torch.nan, 1.0)
        own[0] /= n if weighted else 1.0
        sums = torch.cat([own.flatten(), own.new_full((1,), n if weighted else 1.0 / n)])
        dist.all_reduce(sums, group=group)
        locals_, large = sums[:-1].view(2, -1) * factor**2
        small, n_small, n_large = combine(weighted, group.size(), locals_, sums[-1])
        small, large = small * self._unscale, large * self._unscale
        layers = self._accumulator.layers
        unused = [i for i in range(len(self._names)) if i not in norms]
        rows = [norm.index_fill(0, self._places(unused), torch.nan) for norm in (small, large)]
        small, large = (
            torch.cat([norm.sum().reshape(1), row if layers else row[:0]])
            for norm, row in zip((small, large), rows, strict=True)
        )
        self._row(n_small, n_large, small, large)
        return True

    def _settle(self) -> None:
        """Nothing: a step is exchanged where all processes are sure to come."""

    def _said(self) -> tuple[Note, ...]:
        if not self._unknown_op:
            return self._notes
        text = "gradients are reduced with a divide factor of one's own, so their mean is not known: not measured"
        return (*self._notes, Note("noise.b_simple", text))
