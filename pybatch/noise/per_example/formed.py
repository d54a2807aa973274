"""The slow exact route: every example's gradient formed by itself, for models with layers that have no other.

A vmap over the gradient of one example's loss, in chunks; a loop over the examples where an operation has no rule for
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.noise.feeds import Backward, counted
from pybatch.noise.per_example.feed import SOURCE, ExampleFeed, probed
from pybatch.noise.per_example.refusals import refuse_undefined
from pybatch.records import NoiseScale, Note
from pybatch.workloads.running.session import Session

CHUNK_BYTES = 256 << 20  # of gradients of single examples at a time


class _Loss(nn.Module):
    """The loss of a batch as a function of the model's parameters."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.model, self._of = session.model, session.loss_of

    def forward(self, batch: Any) -> Tensor:
        """Batch to loss."""
        return self._of(self.model, batch)


class FormedFeed(ExampleFeed):
    """As ExampleFeed. Each example is a batch of its own, and the large norm is that of the mean of these gradients.

    Args:
        session: model, loss and data; the loss is a mean over examples, which are cut out along dimension 0.
        layers: whether every parameter is in the record.
        why: what has no faster route, for the record.

    Raises UsageError where gradients of single examples are not defined.
    """

    def __init__(self, session: Session, layers: bool, why: str) -> None:
        refuse_undefined(session.model)
        self.session, self.layers, self.why = session, layers, why
        self.named = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        self.accumulator = NoiseAccumulator(SOURCE, layers=tuple(name for name, _ in self.named) if layers else ())
        self._vmapped = True
        self._loss = _Loss(session)
        size = sum(p.numel() * p.element_size() for _, p in self.named)
        self._chunk = max(1, CHUNK_BYTES // size)
        self.start()

    def micro_batch(self, backward: Backward, n: int, weights: Tensor | None = None, batch: Any = None) -> Tensor:
        """As Feed.micro_batch, from the batch itself."""
        scale = self._shares.add(counted(n, weights))
        device = self.session.device
        weight = torch.ones(n, dtype=torch.float64) if weights is None else weights
        share = (weight / weight.sum()).to(device)
        small = torch.zeros(len(self.named), dtype=torch.float64, device=device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, n, self._chunk):
            part = slice(start, min(start + self._chunk, n))
            grads, losses = self._formed(_cut(batch, part), part.stop - part.start)
            own = weight[part].to(device)
            for i, (_, p) in enumerate(self.named):
                flat = grads[i].flatten(1)
                norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()
                # One that counts for nothing may have a loss that is not a number, such as a mean over no token.
                small[i] += torch.where(own > 0, norms, 0.0) @ own.square()
                kept = torch.where(own[:, None] > 0, flat, 0.0)
                mean = (share[part].to(flat.dtype) @ kept).view_as(p) * scale
                p.grad = mean if p.grad is None else p.grad + mean
            total += torch.where(own > 0, losses.double(), 0.0) @ share[part]
        self._small.append(small)
        self._squared += float(weight.square().sum())
        return total

    def _formed(self, batch: Any, n: int) -> tuple[list[Tensor], Tensor]:
        """Gradients of n examples by parameter, each [n, *shape], and their losses [n]."""
        if self._vmapped:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # torch warns where it loops itself, operation by operation
                    return self._by_vmap(batch)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # no rule for an operation, data-dependent code: the loop below has the real error
                self._vmapped = False
        found = [self._by_itself(_cut(batch, slice(i, i + 1))) for i in range(n)]
        return [torch.stack(own) for own in zip(*(grads for grads, _ in found), strict=True)], torch.stack(
            [loss for _, loss in found]
        )

    def _by_vmap(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        inside = {f"model.{name}": p.detach() for name, p in self.named}

        def loss(parameters: dict[str, Tensor], example: Any) -> Tensor:
            alone = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, example)
            found: Tensor = functional_call(self._loss, parameters, (alone,))
            return found

        places = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        each = vmap(grad_and_value(loss), in_dims=(None, places), randomness="different")
        grads, losses = each(inside, batch)
        return [grads[name].detach() for name in inside], losses.detach()

    def _by_itself(self, example: Any) -> tuple[list[Tensor], Tensor]:
        loss = self.session.loss(example)
        grads = torch.autograd.grad(loss, [p for _, p in self.named], allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else dense(g) for g, (_, p) in zip(grads, self.named, strict=True)]
        return filled, loss.detach()

    @property
    def noise(self) -> NoiseScale:
        """As Feed.noise."""
        text = f"every example's gradient was formed by itself, which is slow: {self.why}"
        return self.accumulator.estimate(notes=(Note("noise.steps", text),))


def dense(grad: Tensor) -> Tensor:
    """A gradient as its numbers, which an embedding with sparse=True gives as those of the rows it read."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def _cut(batch: Any, part: slice) -> Any:
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def fastest(session: Session, layers: bool = False) -> Callable[[], ExampleFeed]:
    """A maker of feeds by the fast route where every layer has it, else by this one.

    Raises UsageError, before anything is measured, where per-example gradients are not defined.
    """
    try:
        return probed(session, layers)
    except UsageError as error:
        why = str(error).removeprefix("per-example norms: ").removesuffix(".")
        session.model.zero_grad()
        FormedFeed(session, layers, why)  # refuses what is not defined
        return lambda: FormedFeed(session, layers, why)
