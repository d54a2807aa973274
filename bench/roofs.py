"""Workloads that are nothing but matrix products, and nothing but copying: how near pybatch reads them to its ceilings.

    python bench/roofs.py [--device cpu] [--dtype fp32] [--threads N] [--rounds 8] [--attempts 3] [--output FILE]

The products should read 90 to 105 % of the GEMM ceiling, the copy likewise of the copy ceiling. Ceilings and steps take
turns, and what counts is the median over the turns of a step's share of the ceiling measured just before it: on a
shared machine both change by a fifth within seconds, and the best of either says little about the other. An attempt
that misses is made again, so many times; every attempt is in the JSON, with the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pybatch import Workload
from pybatch.capacity.flops import count_flops
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.traffic import Traffic, update_bytes
from pybatch.device.ceilings import best_median, measure_ceilings
from pybatch.device.identity import describe, resolve
from pybatch.workloads.base import Split
from pybatch.workloads.running.session import Session

LOW, HIGH = 0.90, 1.05


class Products(Workload):
    """A chain of square linear layers without bias or activation: forward and both gradients are matrix products.

    An example costs (3 depth - 1) 2 width² FLOPs, as the first layer needs no gradient of its input. The update moves
    28 depth width² bytes, and the loss a few times width an example: little beside products of many examples: of an
    H200 at width 8192 the update and the casts to bf16 want 1.2 ms by their bytes, 8192 examples 7 ms by their FLOPs.
    """

    name, unit = "products", "rows"

    def __init__(self, width: int = 1024, depth: int = 2) -> None:
        self.width, self.depth = width, depth

    def model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(self.depth)))

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, self.width, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch).mean()  # its gradient is one number: few bytes beside the products
        return loss

    def flops(self, n: int) -> int:
        """Of a step of n examples."""
        return (3 * self.depth - 1) * 2 * n * self.width**2


class Copies(Workload):
    """Copies the batch into a buffer some times; the model is one number, so that there is something to train."""

    name, unit = "copies", "rows"

    def __init__(self, width: int = 1 << 16, times: int = 4) -> None:
        self.width, self.times = width, times
        self.buffer: torch.Tensor | None = None

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, self.width, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if self.buffer is None or self.buffer.shape != batch.shape or self.buffer.device != batch.device:
            self.buffer = torch.empty_like(batch)
        for _ in range(self.times):
            self.buffer.copy_(batch)
        weight = next(model.parameters())
        return weight.square().sum()

    def bytes(self, n: int) -> int:
        """Of the copies of n examples, read and written."""
        return self.times * 2 * 4 * n * self.width


def read(step: TrainingStep, dtype: str, rounds: int, seconds: float, share: float) -> dict[str, Any]:
    """One attempt on a loaded step: medians over the rounds of its time, of the ceilings, and of the shares of them.

    `share` is that of the ceiling in question in the time `measure_ceilings` takes.
    """
    device = step.session.device
    load = os.getloadavg()[0]
    step()  # the optimizer's state exists from here on
    with Traffic() as traffic:
        flops, _ = count_flops(step)
    moved = traffic.bytes + update_bytes(step.session.parameters, step.optimizer.state)
    shares: dict[str, list[float]] = {"mfu_measured": [], "mbu_measured": []}
    rates: dict[str, list[float]] = {"gemm_flops": [], "copy_bytes_per_s": []}
    steps: list[float] = []
    for _ in range(rounds):
        ceilings = measure_ceilings(device, dtype, seconds / share)
        steps.append(best_median(device, step, seconds))
        for figure, rate, work in zip(shares, rates, (flops, moved), strict=True):
            ceiling = getattr(ceilings, rate)
            if ceiling and work is not None:
                rates[rate].append(ceiling)
                shares[figure].append(work / steps[-1] / ceiling)
    found: dict[str, Any] = {"step_ms": 1e3 * statistics.median(steps), "model_flops": flops, "step_bytes": moved}
    for name, values in (rates | shares).items():
        found[name] = statistics.median(values) if values else None
    for name, values in shares.items():
        found[f"{name}_rounds"] = values
    return found | {"load_before": load}


def main() -> int:
    """Measure both; exit status 1 where one is outside 90 to 105 % in every attempt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16, of the products")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument("--rounds", type=int, default=8, help="of a ceiling and of steps, in turn")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = resolve("cuda:0" if arguments.device == "cuda" else arguments.device)
    large = device.type == "cuda"
    cases: list[tuple[Workload, int, str, str, float]] = [
        (Products(8192 if large else 1024), 65_536 if large else 4096, "mfu_measured", arguments.dtype, 2 / 3),
        (Copies(1 << 20 if large else 1 << 16), 512, "mbu_measured", "fp32", 1 / 3),
    ]
    attempts: list[dict[str, Any]] = []
    within = True
    for work, batch, figure, dtype, part in cases:
        step = TrainingStep(Session(work, device, dtype))
        step.load(batch)
        for attempt in range(arguments.attempts):
            named = {"workload": work.name, "batch": batch, "attempt": attempt + 1}
            attempts.append(named | read(step, dtype, arguments.rounds, arguments.seconds, part))
            share = attempts[-1][figure]
            said = "not measured" if share is None else f"{100 * share:.1f} % of the ceiling"
            print(f"{work.name:9} attempt {attempt + 1}: {said}, load {attempts[-1]['load_before']:.1f}", flush=True)
            if arguments.output is not None:  # after each: the run may be cut short
                figures = {"device": describe(device).name, "threads": torch.get_num_threads(), "attempts": attempts}
                arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
            if share is not None and LOW <= share <= HIGH:
                break
        else:
            within = False
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
