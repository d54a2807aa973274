"""Cost of measuring the noise scale in a training step, by source, against the same step without it.

    python bench/noise.py [--device cpu|cuda] [--repeats N] [--output FILE]
    torchrun --nproc-per-node 2 bench/noise.py ...    # DDP and FSDP2 over processes; alone, FSDP2 reduces nothing

A step is forward and backward of several micro-batches and one AdamW update. Each variant trains a model of its own;
variant and baseline are interleaved in one process, in changing order. The ratio is of medians, its interval from
resampling the pairs of samples. Before anything is timed, every source's pair of norms is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pybatch.noise
from pybatch.device.identity import describe
from pybatch.noise.estimator import pair
from pybatch.noise.handle import Handle
from pybatch.optim import AdamW

MICRO_BATCHES, EXAMPLES, LENGTH, VOCABULARY, TOLERANCE = 2, 8, 64, 512, 1e-3


class Model(nn.Module):
    """A small Transformer language model of 3.4 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [n, length] to logits [n, length, vocabulary]."""
        logits: torch.Tensor = self.head(self.body(self.embed(tokens)))
        return logits


class Step:
    """One training step, plain or measured."""

    def __init__(self, device: torch.device, source: str | None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Model().to(device)
        self.fused = source in ("accumulate", "accumulate, no noise")
        self.base = self.model
        if source and source.startswith("ddp"):
            self.model = DistributedDataParallel(self.model)
        if source and source.startswith("fsdp"):
            fully_shard(self.model)
        kind: Any = AdamW if self.fused else torch.optim.AdamW
        own = {"noise": source == "accumulate"} if self.fused else {"fused": True}
        self.optimizer = kind(self.model.parameters(), lr=0.0, **own)
        self.handle: Handle | None = None
        if source and not self.fused and not source.endswith("no noise"):
            self.handle = pybatch.noise.attach(self.model, self.optimizer, source, **options)  # type: ignore[arg-type]
        self.tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, EXAMPLES, LENGTH + 1), device=device)

    def loss(self, i: int) -> torch.Tensor:
        """Of micro-batch i."""
        logits = self.model(self.tokens[i, :, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[i, :, 1:].flatten())

    def __call__(self) -> None:
        for i in range(MICRO_BATCHES):
            if self.fused:
                self.loss(i).backward()  # type: ignore[no-untyped-call]
                self.optimizer.accumulate(EXAMPLES)
            else:
                (self.loss(i) / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """The pair of norms of a step of micro-batches is that of its gradients in float64."""
        grads = []
        for i in range(MICRO_BATCHES):
            found = torch.autograd.grad(self.loss(i), list(self.model.parameters()))
            grads.append(torch.cat([g.double().flatten() for g in found]))
        small = sum(float(g.square().sum()) for g in grads) / MICRO_BATCHES
        large = float((sum(grads, torch.zeros(())) / MICRO_BATCHES).square().sum())
        want = pair(small, large, EXAMPLES, EXAMPLES * MICRO_BATCHES)
        self()
        noise = self.handle.noise if self.handle else self.optimizer.noise
        assert noise.grad_sq is not None
        assert noise.trace is not None
        error = max(abs(noise.grad_sq - want[0]), abs(noise.trace - want[1])) / abs(want[1])
        if not error < TOLERANCE:
            raise SystemExit(f"{noise.source}: norms differ from float64 by {error:.1e}; not timed")


Maker = Callable[[torch.device], Step]
VARIANTS: dict[str, tuple[Maker, Maker]] = {
    "opt.accumulate, noise=True": (lambda d: Step(d, "accumulate"), lambda d: Step(d, "accumulate, no noise")),
    "micro-batches by hooks": (lambda d: Step(d, "micro-batches"), lambda d: Step(d, None)),
    "the same, layers": (lambda d: Step(d, "micro-batches", layers=True), lambda d: Step(d, None)),
    "the same, preconditioned": (lambda d: Step(d, "micro-batches", preconditioned=True), lambda d: Step(d, None)),
    "adam-moments": (lambda d: Step(d, "adam-moments"), lambda d: Step(d, None)),
    "ddp": (lambda d: Step(d, "ddp"), lambda d: Step(d, "ddp, no noise")),
    "ddp, layers": (lambda d: Step(d, "ddp", layers=True), lambda d: Step(d, "ddp, no noise")),
    "fsdp": (lambda d: Step(d, "fsdp"), lambda d: Step(d, "fsdp, no noise")),
}
CHECKED = ("opt.accumulate, noise=True", "micro-batches by hooks", "the same, layers")


def interval(measured: list[float], plain: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians, resampling interleaved pairs."""
    pairs = np.array([measured, plain])
    index = np.random.default_rng(0).integers(0, pairs.shape[1], (2000, pairs.shape[1]))
    medians = np.median(pairs[:, index], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(low), float(high)


def measure(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Validate where a step gives one pair, then time the variant and its baseline in turns."""
    make, make_plain = VARIANTS[name]
    if name in CHECKED:
        make(device).check()
    sides = {"measured": make(device), "plain": make_plain(device)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(repeats + 3):
        for side in sorted(sides, reverse=bool(i % 2)):
            wait(device)
            dist.barrier()
            start = time.perf_counter()
            sides[side]()
            wait(device)
            if i >= 3:  # warm
                times[side].append(time.perf_counter() - start)
    low, high = interval(times["measured"], times["plain"])
    median = {side: statistics.median(values) for side, values in times.items()}
    return {
        "what": name,
        "measured_ms": median["measured"] * 1e3,
        "plain_ms": median["plain"] * 1e3,
        "ratio": median["measured"] / median["plain"],
        "ratio_low": low,
        "ratio_high": high,
        "validated": name in CHECKED,
        "repeats": repeats,
    }


def wait(device: torch.device) -> None:
    """For the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print; `--output` writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        rank, world, load = dist.get_rank(), dist.get_world_size(), os.getloadavg()[0]
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        alone = world == 1
        names = [name for name in VARIANTS if (name != "fsdp" if alone else name.startswith(("ddp", "fsdp")))]
        rows = [measure(name, device, arguments.repeats) for name in names]
        dist.destroy_process_group()
    if rank:
        return
    parameters = sum(p.numel() for p in Model().parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {MICRO_BATCHES} micro-batches of {EXAMPLES} x {LENGTH}, "
        f"{world} processes; load {load:.1f}"
    )
    for row in rows:
        print(
            f"{row['what']:28} {row['measured_ms']:8.1f} ms  plain {row['plain_ms']:8.1f} ms  "
            f"{row['ratio']:.3f}x [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        )
    if arguments.output:
        record = {
            "script": "bench/noise.py",
            "device": describe(device).name,
            "kind": arguments.device,
            "threads": torch.get_num_threads(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "processes": world,
            "load_before": load,
            "results": rows,
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
