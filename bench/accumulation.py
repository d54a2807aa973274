"""Cases of the step benchmark in which micro-batches are accumulated and noise statistics are kept, with AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from shapes import Shapes
from tensors import gradients, parameters, share

from pybatch.fits.noise import pair
from pybatch.optim import AdamW

MICRO_BATCHES = 4


class NoisyStep:
    """Two micro-batches, clip and update: noise statistics on our side, plain sums on torch's."""

    optimizer, precision, chain = "AdamW", "fp32", "2 micro-batches + clip; ours with noise"
    # Ours: 4 for the first gradient, which becomes the sum, 12 for the second, and 28: the norm came with the sums.
    ours_bytes, tolerance = 4 + 12 + 28, 5e-3

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.ours, self.theirs = parameters(shapes, device), parameters(shapes, device)
        self.fused = AdamW(self.ours, max_grad_norm=1.0, noise=True)
        self.peer = torch.optim.AdamW(self.theirs, fused=True)
        self.sides: dict[str, Callable[[], object]] = {"ours": self.run_ours, "torch fused": self.run_torch}
        self.steps = 0

    def prepare(self, seed: int | None) -> None:
        if seed is not None:
            self.batches = [gradients(self.ours, 2 * seed), gradients(self.ours, 2 * seed + 1)]
            self.steps += 1
        self.first_ours = [g.clone() for g in self.batches[0]]  # both sides write into their first gradient
        self.first_torch = [g.clone() for g in self.batches[0]]

    def run_ours(self) -> None:
        for batch in (self.first_ours, self.batches[1]):
            for p, g in zip(self.ours, batch, strict=True):
                p.grad = g
            self.fused.accumulate(8)
        self.fused.step()

    def run_torch(self) -> None:
        for p, g in zip(self.theirs, self.first_torch, strict=True):
            p.grad = g
        torch._foreach_add_(self.first_torch, self.batches[1])
        torch.nn.utils.clip_grad_norm_(self.theirs, 1.0, foreach=True)
        self.peer.step()

    def errors(self) -> dict[str, float]:
        """As a step's. The pair of the last step must be the one a float64 computation gives, within 1e-3."""
        assert self.fused.noise.steps == self.steps, "no pair of norms was recorded"
        small = sum(float((g.double() ** 2).sum()) for batch in self.batches for g in batch) / 2
        large = sum(float(((a.double() + b) ** 2).sum()) for a, b in zip(*self.batches, strict=True)) / 4
        assert self.fused._ledger is not None
        row = self.fused._ledger.ring[self.steps - 1].tolist()
        want = pair(small, large, 8, 16)
        off: float = max(abs(got - value) for got, value in zip(row[1:], want, strict=True)) / max(map(abs, want))
        assert off < 1e-3, f"the pair of norms is off by {off:.1e}"
        return {"torch fused": share(self.ours, self.theirs, parameters(self.shapes, self.device))}


class Accumulate:
    """Micro-batches added to a sum, with the norm of each: torch takes the norm, then adds. No update is timed."""

    optimizer, precision, chain = "AdamW", "fp32", f"{MICRO_BATCHES} micro-batches summed with norms, no update"
    # 4 for the first, which becomes the sum, then 12 each.
    ours_bytes, tolerance = 4 + 12 * (MICRO_BATCHES - 1), 1e-3

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.ours, self.theirs = parameters(shapes, device), parameters(shapes, device)
        self.fused = AdamW(self.ours, noise=True)
        self.batches = [gradients(self.ours, seed) for seed in range(MICRO_BATCHES)]
        self.sides: dict[str, Callable[[], object]] = {"ours": self.run_ours, "torch foreach": self.run_torch}

    def prepare(self, seed: int | None) -> None:
        self.fused.zero_grad()
        self.first_ours = [g.clone() for g in self.batches[0]]  # both sides write into their first gradient
        self.first_torch = [g.clone() for g in self.batches[0]]

    def run_ours(self) -> None:
        for batch in [self.first_ours, *self.batches[1:]]:
            for p, g in zip(self.ours, batch, strict=True):
                p.grad = g
            self.fused.accumulate(8)

    def run_torch(self) -> None:
        total: list[torch.Tensor] = []
        self.norms = []
        for batch in [self.first_torch, *self.batches[1:]]:
            for p, g in zip(self.theirs, batch, strict=True):
                p.grad = g
            grads = [p.grad for p in self.theirs if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads, foreach=True))
            if total:
                torch._foreach_add_(total, grads)
            else:
                total = grads
            for p in self.theirs:
                p.grad = None

    def errors(self) -> dict[str, float]:
        """Deviation of the sums; our squared norms must be float64's within 1e-3."""
        pairs = zip(self.first_ours, self.first_torch, strict=True)
        off = max(float((a - b).abs().max()) / float(b.abs().max()) for a, b in pairs)
        # Against float64: torch's own fp32 norm of one tensor of 32 M is off by 2e-3.
        want = sum(8.0 * float((g.double() ** 2).sum()) for batch in self.batches for g in batch)
        assert self.fused._ledger is not None
        got = float(self.fused._ledger["micro_sq"])
        assert abs(got / want - 1.0) < 1e-3, f"squared norms of the micro-batches: {got} instead of {want}"
        return {"torch foreach": off}
