"""States in bf16 and 8 bits against fp32: where training ends, bytes per parameter, time of a step.

    python bench/state_dtype.py [--seeds 8] [--steps 300] [--repeats 7] [--workloads digits,text]

Every seed trains once a state_dtype, from the same weights and on the same batches; the loss is on a fixed batch of the
test split. What a state_dtype costs is the mean over seeds of its loss less fp32's of the same seed, with its standard
error; beside it stands what two seeds of fp32 differ by (standard deviation). Then times of an AdamW step with clipping
over one tensor of 32 M elements, interleaved. Figures: bench/results/NOTES.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pybatch import ops, optim
from pybatch.workloads.running.finding import find

KINDS = tuple(ops.STATE_TYPES)
OPTIMIZERS: dict[str, tuple[type[optim.FusedOptimizer], float]] = {
    "AdamW": (optim.AdamW, 3e-3),
    "SGD": (optim.SGD, 0.1),
    "Adan": (optim.Adan, 3e-3),
}
BATCH, HELD_OUT = 32, 256


def final_loss(workload: Any, optimizer: str, kind: str, seed: int, steps: int) -> float:
    """Loss on the held-out batch after some steps."""
    torch.manual_seed(seed)
    model, (cls, lr) = workload.model(), OPTIMIZERS[optimizer]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = cls(model.parameters(), lr=lr, max_grad_norm=1.0, state_dtype=kind, **more)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        workload.loss(model, workload.batch(BATCH, generator)).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        return float(workload.loss(model, workload.batch(HELD_OUT, torch.Generator().manual_seed(0), "test")))


def step_of(kind: str, size: int) -> Callable[[], object]:
    """One AdamW step with clipping over a tensor of this size."""
    p = torch.nn.Parameter(torch.randn(size))
    p.grad = torch.randn(size)
    opt = optim.AdamW([p], max_grad_norm=1.0, state_dtype=kind)
    return opt.step


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=32 << 20)
    parser.add_argument("--workloads", default="digits,text")
    given = parser.parse_args()
    for name in filter(None, given.workloads.split(",")):
        workload = find(name)
        for optimizer in OPTIMIZERS:
            losses = {
                kind: [final_loss(workload, optimizer, kind, seed, given.steps) for seed in range(given.seeds)]
                for kind in KINDS
            }
            spread = statistics.stdev(losses["fp32"])
            print(f"{name}, {optimizer}: fp32 {statistics.mean(losses['fp32']):.4f}, seeds differ by {spread:.4f}")
            for kind in KINDS[1:]:
                apart = [a - b for a, b in zip(losses[kind], losses["fp32"], strict=True)]
                error = statistics.stdev(apart) / math.sqrt(len(apart))
                print(f"  {kind:>5} {statistics.mean(apart):+.4f} +- {error:.4f}", flush=True)
    steps = {kind: step_of(kind, given.size) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(given.repeats + 1):
        for kind, step in steps.items():
            start = time.process_time()
            step()
            times[kind].append(time.process_time() - start)
    for kind in KINDS:
        p = torch.nn.Parameter(torch.empty(given.size))
        held = optim.AdamW([p], state_dtype=kind).state_bytes / given.size
        took, ratios = times[kind][1:], [a / b for a, b in zip(times[kind][1:], times["fp32"][1:], strict=True)]
        print(
            f"AdamW, {kind}: {held:.2f} B per parameter, {1e3 * min(took):.1f} ms of processor time a step at least, "
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of fp32's"
        )


if __name__ == "__main__":
    main()
