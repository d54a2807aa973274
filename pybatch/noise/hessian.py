"""B_noise = tr(H Sigma) / (G^T H G), the noise scale that sets the best step, by Hessian-vector products.

McCandlish et al. 2018, eq. 2.8. With independent mean gradients a and b over n examples each, and the Hessian H of the
loss on further examples: E (a^T H a + b^T H b) / 2 = G^T H G + tr(H Sigma) / n, and for their mean the same over 2 n.
Where examples are weighted, n is what they count for, and the means are weighted by it. That is a pair of norms with H
between them, for the same arithmetic as every other noise scale. H may be indefinite.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pybatch.base import numerals
from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.fits.noise import judge
from pybatch.noise.feeds import counted
from pybatch.noise.groups import Tally
from pybatch.records import WeightedNoise
from pybatch.workloads.running.session import Session

MISSING = "the time budget ended before the first Hessian-vector product"
NEGATIVE = (
    "G^T H G or tr(H Sigma) is negative beyond its error: along the gradient the loss is not convex here, so no batch "
    "size follows from it"
)
LEAST_PAIRS = 32  # one block each in the interval

Gradient = Sequence[torch.Tensor]


def products(
    loss: torch.Tensor, parameters: list[torch.Tensor], directions: Sequence[Gradient]
) -> list[list[torch.Tensor]]:
    """Hessian-vector products of a loss with each direction, by differentiating its gradient once more.

    Args:
        loss: 0-d, with its graph.
        parameters: what to differentiate by.
        directions: each one tensor per parameter.
    """
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    curved = [(s, i) for i, s in enumerate(slopes) if s.requires_grad]
    kept, found = [p.grad for p in parameters], []
    try:
        for direction in directions:
            for p in parameters:
                p.grad = None
            if curved:
                # Not autograd.grad(): asked for parameters that may be unused, it returns zeros past an operation that
                # has no second derivative. Going through the whole graph raises there.
                torch.autograd.backward([s for s, _ in curved], [direction[i] for _, i in curved], retain_graph=True)
            found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
    return found


def dot(one: Gradient, two: Gradient) -> torch.Tensor:
    """Inner product, summed in fp64: 0-d float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(one, two, strict=True)]).sum()


class HessianNoise:
    """Measures B_noise of a session's model at its present parameters.

    Args:
        session: model, data and loss.
        micro_batch: examples per backward pass.
        k: micro-batches averaged into each of the two gradients; n = k * micro_batch near B_noise resolves it soonest.
    """

    def __init__(self, session: Session, micro_batch: int, k: int) -> None:
        self.session, self.micro_batch, self.k = session, micro_batch, k
        self.parameters: list[torch.Tensor] = list(session.parameters)
        self._pairs = NoiseAccumulator("hessian-vector products", missing=MISSING)
        self.tally = Tally()

    def run(self, deadline: float, width: float, say: Callable[[str], None] = lambda _: None) -> WeightedNoise:
        """Measure until the interval is narrow or time is up.

        Args:
            deadline: on time.monotonic().
            width: relative half width of the interval to stop at.
            say: called with what is being done.

        Raises:
            UsageError: the model has an operation without a second derivative.
        """
        wanted = LEAST_PAIRS
        while time.monotonic() < deadline:
            say("measuring curvature")
            self.pair()
            wanted -= 1
            if wanted <= 0:
                found = self.result
                if found.status == "resolved" and _width(found) <= width:
                    break
                wanted = max(1, found.steps // 4)  # looking seldom: stopping on a look costs coverage
        return self.result

    def pair(self) -> None:
        """One pair: two gradients and the curvature, all of their own examples."""
        (one, n_one), (two, n_two) = self._gradient(), self._gradient()
        try:
            # Fused attention and recurrence have no second derivative; their plain forms do.
            with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
                loss = self.session.loss(self.session.batch(self.micro_batch))
                curved_one, curved_two = products(loss, self.parameters, [one, two])
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error) for word in ("derivative", "double backward", "differentiate twice")):
                raise
            raise UsageError(
                f"hessian=True: the model has an operation without a second derivative ({error}). "
                "Leave hessian out, or replace the operation."
            ) from error
        inner = torch.stack([dot(one, curved_one), dot(two, curved_two), dot(one, curved_two)])
        aa, bb, ab = inner.tolist()
        n = n_one + n_two
        large = (n_one * n_one * aa + n_two * n_two * bb + 2 * n_one * n_two * ab) / n**2
        self._pairs.update((n_one * aa + n_two * bb) / n, large, n / 2, n)

    def _gradient(self) -> tuple[list[torch.Tensor], float]:
        """The mean gradient over k micro-batches, and what they count for."""
        total, n = [torch.zeros_like(p) for p in self.parameters], 0.0
        for _ in range(self.k):
            batch, weights = self.session.weighed_batch(self.micro_batch)
            count = counted(self.micro_batch, weights)
            grads = torch.autograd.grad(self.session.loss(batch), self.parameters, materialize_grads=True)
            torch._foreach_add_(total, list(grads), alpha=count)
            n += count
            self.tally.add(weights)
        torch._foreach_div_(total, n)
        return total, n

    @property
    def result(self) -> WeightedNoise:
        """B_noise so far, in examples."""
        mean = self.tally.mean
        found = judge(self._pairs.rows, self.k * self.micro_batch * (mean or 1.0), MISSING, NEGATIVE).weighted()
        if mean is not None:
            found = found.in_examples(mean, self.tally.error)
        if self._pairs.skipped and found.reason is None:
            return dataclasses.replace(
                found, reason=f"left out as not finite: {numerals.counted(self._pairs.skipped, 'pair')}"
            )
        return found


def _width(found: WeightedNoise) -> float:
    if not found.b_noise or found.low is None or found.high is None:
        return math.inf
    return (found.high - found.low) / 2 / found.b_noise
