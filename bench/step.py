"""Clip + AdamW, alone and after two micro-batches with noise statistics, and accumulation, against torch's chain.

    python bench/step.py [--device cpu|cuda] [--repeats N] [--output FILE]

Validated on the same inputs before anything is timed. Random data, last-level cache flushed before every sample, the
two sides interleaved in one process. The ratio is of the medians; its interval is from resampling the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pybatch import ops
from pybatch.device.identity import describe
from pybatch.noise.estimator import pair
from pybatch.optim import AdamW

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one tensor of 32 M": [(32 << 20,)],
    "1000 tensors of 64x64": [(64, 64)] * 1000,
}
MICRO_BATCHES = 4
FLUSH_BYTES = 256 << 20  # several times any last-level cache met so far


class Clock:
    """Seconds a call takes, with a cold cache, on either device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.randn(FLUSH_BYTES // 4, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        self.flush.add_(1.0)
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def gradients(params: list[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device) for p in params]


class Step:
    """One update: clip to global norm 1, AdamW. Bytes are of the byte model."""

    name, ours_bytes, torch_bytes = "clip + AdamW", 32, 40
    noise = False

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self.ours, self.theirs = parameters(shapes, device), parameters(shapes, device)
        self.fused = AdamW(self.ours, max_grad_norm=1.0, noise=self.noise)
        self.peer = torch.optim.AdamW(self.theirs, fused=True)
        self.prepare(0)

    def prepare(self, seed: int) -> None:
        if seed < 3:  # fresh gradients while validating; the same ones while timing
            for p, q, g in zip(self.ours, self.theirs, gradients(self.ours, seed), strict=True):
                p.grad, q.grad = g, g.clone()

    def run_ours(self) -> None:
        self.fused.step()

    def run_torch(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.theirs, 1.0, foreach=True)
        self.peer.step()

    def check(self) -> float:
        """Largest deviation over largest movement."""
        start = parameters([tuple(p.shape) for p in self.ours], self.ours[0].device)
        pairs = [(p.detach(), q.detach(), s.detach()) for p, q, s in zip(self.ours, self.theirs, start, strict=True)]
        movement = max(float((q - s).abs().max()) for _, q, s in pairs)
        return max(float((p - q).abs().max()) for p, q, _ in pairs) / movement


class NoisyStep(Step):
    """Two micro-batches and one update: noise statistics on our side, plain sums on torch's."""

    name = "2 micro-batches + clip + AdamW; ours with noise"
    # Ours: 4 for the first gradient, which becomes the sum, 12 for the second, and 28: the norm came with the sums.
    # Torch: 12 for the addition, then norm, clip and update.
    ours_bytes, torch_bytes = 4 + 12 + 28, 12 + 40
    noise = True

    def prepare(self, seed: int) -> None:
        if seed < 3:
            self.batches = [gradients(self.ours, 2 * seed), gradients(self.ours, 2 * seed + 1)]
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
        super().run_torch()

    def check(self) -> float:
        """As a step's. The pair of the last step must be the one a float64 computation gives, within 1e-3."""
        assert self.fused.noise.steps == 3, "no pair of norms was recorded"
        small = sum(float((g.double() ** 2).sum()) for batch in self.batches for g in batch) / 2
        large = sum(float(((a.double() + b) ** 2).sum()) for a, b in zip(*self.batches, strict=True)) / 4
        assert self.fused._ledger is not None
        row = self.fused._ledger.ring[2].tolist()
        want = pair(small, large, 8, 16)
        error: float = max(abs(got - value) for got, value in zip(row[1:], want, strict=True)) / max(map(abs, want))
        return max(super().check(), error)


class Accumulate:
    """Micro-batches added to a sum, with the norm of each: torch takes the norm, then adds. No update is timed."""

    name = f"{MICRO_BATCHES} micro-batches, summed with norms"
    # Ours: 4 for the first, which becomes the sum, then 12 each. Torch: 4 for the norm, and 12 for every addition.
    ours_bytes, torch_bytes = 4 + 12 * (MICRO_BATCHES - 1), 4 + 16 * (MICRO_BATCHES - 1)

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self.ours, self.theirs = parameters(shapes, device), parameters(shapes, device)
        self.fused = AdamW(self.ours, noise=True)
        self.batches = [gradients(self.ours, seed) for seed in range(MICRO_BATCHES)]
        self.prepare(0)

    def prepare(self, seed: int) -> None:
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

    def check(self) -> float:
        pairs = zip(self.first_ours, self.first_torch, strict=True)
        error = max(float((a - b).abs().max()) / float(b.abs().max()) for a, b in pairs)
        # Against float64: torch's own fp32 norm of one tensor of 32 M is off by 2e-3.
        want = sum(8.0 * float((g.double() ** 2).sum()) for batch in self.batches for g in batch)
        assert self.fused._ledger is not None
        return max(error, abs(float(self.fused._ledger["micro_sq"]) / want - 1.0))


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of median(theirs) / median(ours), resampling interleaved pairs."""
    pairs = np.array([ours, theirs])
    index = np.random.default_rng(0).integers(0, pairs.shape[1], (2000, pairs.shape[1]))
    medians = np.median(pairs[:, index], axis=2)
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def measure(kind: type[Step | Accumulate], label: str, clock: Clock, repeats: int) -> dict[str, Any]:
    """Validate, then time both sides."""
    shapes = SHAPES[label]
    case: Step | Accumulate = kind(shapes, clock.device)
    for seed in range(3 if issubclass(kind, Step) else 1):
        case.prepare(seed)
        case.run_ours()
        case.run_torch()
    error = case.check()
    if not error < 1e-3:
        raise SystemExit(f"{kind.name}, {label}: results differ by {error:.1e} of the movement; not timed")
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for i in range(repeats):
        case.prepare(3 + i)
        order = [("ours", case.run_ours), ("torch", case.run_torch)]
        for name, run in order if i % 2 else order[::-1]:
            times[name].append(clock(run))
    elements = sum(math.prod(shape) for shape in shapes)
    median = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    low, high = interval(times["ours"], times["torch"])
    return {
        "what": kind.name,
        "shapes": label,
        "error_over_movement": error,
        "ours_ms": median["ours"] * 1e3,
        "torch_ms": median["torch"] * 1e3,
        "ours_quartiles_ms": [spread["ours"][0] * 1e3, spread["ours"][2] * 1e3],
        "torch_quartiles_ms": [spread["torch"][0] * 1e3, spread["torch"][2] * 1e3],
        "ratio": median["torch"] / median["ours"],
        "ratio_low": low,
        "ratio_high": high,
        "ours_bytes_per_s": elements * kind.ours_bytes / median["ours"],
        "torch_bytes_per_s": elements * kind.torch_bytes / median["torch"],
        "repeats": repeats,
    }


def ceilings(clock: Clock, repeats: int) -> dict[str, float]:
    """Bytes read + written per second on 256 MiB: a copy, and an update in place (no write-allocate traffic)."""
    source = torch.randn(FLUSH_BYTES // 4, device=clock.device)
    target = torch.empty_like(source)
    works = {"copy": lambda: target.copy_(source), "in_place": lambda: target.add_(1.0)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: 2 * FLUSH_BYTES / statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print; `--output` writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clock = Clock(torch.device(arguments.device))
    roof = ceilings(clock, max(5, arguments.repeats // 3))
    rows = [
        measure(kind, label, clock, arguments.repeats) for kind in (Step, NoisyStep, Accumulate) for label in SHAPES
    ]
    print(f"ceilings: copy {roof['copy'] / 1e9:.1f} GB/s, in place {roof['in_place'] / 1e9:.1f} GB/s")
    for row in rows:
        share = row["ours_bytes_per_s"] / max(roof.values())
        print(
            f"{row['what']:47} {row['shapes']:22} ours {row['ours_ms']:7.2f} ms  torch {row['torch_ms']:7.2f} ms  "
            f"{row['ratio']:5.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]  "
            f"{row['ours_bytes_per_s'] / 1e9:5.1f} GB/s of the byte model, {share:4.0%} of the ceiling"
        )
    if arguments.output:
        record = {
            "script": "bench/step.py",
            "device": describe(clock.device).name,
            "kind": arguments.device,
            "threads": torch.get_num_threads(),
            "vector_width": ops.build().cpu_width,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "ceilings_bytes_per_s": roof,
            "results": rows,
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
