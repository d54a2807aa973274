"""Cost of measuring the noise scale in a training step, by source, against the same step without it.

    python bench/noise.py [--device cpu|cuda] [--seconds S] [--only NAME ...] [--output FILE]
    torchrun --nproc-per-node 2 bench/noise.py ...    # DDP and FSDP2 over processes; alone, FSDP2 reduces nothing

A step is forward and backward of several micro-batches and one AdamW update. Measured (A) and plain (B) steps follow
each other as A B B A and B A A B in turns, in one process: drift over a block cancels. A block's ratio is that of its
geometric means; given are the median over blocks and its 95 % interval from resampling blocks. On a CPU the same is
done for the processor time of the process, all threads: what neighbours take from the wall clock is not in it, what
they take from caches is. "null" times the plain step against itself: what it differs from 1 by is the method's error.
Before anything is timed, every source's pair of norms is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pybatch.noise
from pybatch.device.identity import describe
from pybatch.fits.noise import pair
from pybatch.noise.handle import Handle
from pybatch.optim import AdamW

MICRO_BATCHES, EXAMPLES, TOLERANCE = 2, 8, 1e-3


class Size(NamedTuple):
    """Of the model and its batch."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    length: int


SIZES = {"cpu": Size(256, 4, 4, 512, 64), "cuda": Size(768, 12, 12, 50257, 1024)}  # 3.4 M parameters, GPT-2 124M's


class Model(nn.Module):
    """A Transformer language model; on a GPU its head is not tied to the embedding, and it trains in bf16 autocast."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [n, length] to logits [n, length, vocabulary]."""
        logits: torch.Tensor = self.head(self.body(self.embed(tokens)))
        return logits


class Step:
    """One training step, plain or measured.

    Args:
        device: where.
        source: of the noise; None: torch's step.
        model: one to share, so that both sides work in the same memory.
        options: of `attach`.
    """

    def __init__(
        self, device: torch.device, source: str | None, model: nn.Module | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.device, size = device, SIZES[device.type]
        self.model: nn.Module = model or Model(size).to(device)
        self.fused = source in ("accumulate", "accumulate, no noise")
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
        self.tokens = torch.randint(0, size.vocabulary, (MICRO_BATCHES, EXAMPLES, size.length + 1), device=device)

    def loss(self, i: int) -> torch.Tensor:
        """Of micro-batch i."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
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


class SmallStep(Step):
    """As many steps of an MLP of 4,810 parameters as take some milliseconds: what hooks cost where a step is short."""

    STEPS = 20

    def __init__(self, device: torch.device, source: str | None, micro_batches: int = MICRO_BATCHES) -> None:
        torch.manual_seed(0)
        self.device, self.fused, self.handle, self.parts = device, False, None, micro_batches
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        if source:
            self.handle = pybatch.noise.attach(self.model, self.optimizer, source)  # type: ignore[arg-type]
        self.images = torch.randn(MICRO_BATCHES, EXAMPLES, 64, device=device)
        self.labels = torch.randint(0, 10, (MICRO_BATCHES, EXAMPLES), device=device)

    def loss(self, i: int) -> torch.Tensor:
        """Of micro-batch i."""
        return nn.functional.cross_entropy(self.model(self.images[i]), self.labels[i])

    def __call__(self) -> None:
        for _ in range(self.STEPS):
            for i in range(self.parts):
                (self.loss(i) / self.parts).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


def small(source: str, micro_batches: int = MICRO_BATCHES) -> Callable[[torch.device], Sides]:
    """An MLP for each side."""
    return lambda device: (SmallStep(device, source, micro_batches), SmallStep(device, None, micro_batches))


Sides = tuple[Step, Step]  # measured and plain


def apart(source: str, plain: str | None, **options: Any) -> Callable[[torch.device], Sides]:
    """A model for each side: hooks on one would be on the other's too."""
    return lambda device: (Step(device, source, **options), Step(device, plain))


def shared(source: str) -> Callable[[torch.device], Sides]:
    """Two optimizers over one model."""

    def make(device: torch.device) -> Sides:
        plain = Step(device, "accumulate, no noise")
        return Step(device, source, plain.model), plain

    return make


VARIANTS: dict[str, Callable[[torch.device], Sides]] = {
    "opt.accumulate, noise=True": shared("accumulate"),
    "null": shared("accumulate, no noise"),
    "micro-batches by hooks": apart("micro-batches", None),
    "the same, layers": apart("micro-batches", None, layers=True),
    "the same, preconditioned": apart("micro-batches", None, preconditioned=True),
    "adam-moments": apart("adam-moments", None),
    "small: micro-batches": small("micro-batches"),
    "small: per-example": small("per-example", 1),  # of every tenth step
    "ddp": apart("ddp", "ddp, no noise"),
    "ddp, layers": apart("ddp", "ddp, no noise", layers=True),
    "fsdp": apart("fsdp", "fsdp, no noise"),
}
CHECKED = ("opt.accumulate, noise=True", "micro-batches by hooks", "the same, layers", "small: micro-batches")
ORDERS = ((0, 1, 1, 0), (1, 0, 0, 1))  # 0 measured, 1 plain
LEAST_BLOCKS = 8


def ratio(blocks: list[list[list[float]]]) -> dict[str, float]:
    """Of measured over plain, with its 95 % interval, from blocks of times [side][sample]."""
    logs = np.log(np.array(blocks)).mean(axis=2)
    found = logs[:, 0] - logs[:, 1]
    index = np.random.default_rng(0).integers(0, len(found), (4000, len(found)))
    low, high = np.quantile(np.median(found[index], axis=1), [0.025, 0.975])
    return {"ratio": math.exp(np.median(found)), "ratio_low": math.exp(low), "ratio_high": math.exp(high)}


def block(sides: Sides, order: tuple[int, ...], device: torch.device) -> tuple[list[list[float]], list[list[float]]]:
    """Wall-clock and processor seconds of a block of steps: [side][sample]."""
    wall: list[list[float]] = [[], []]
    cpu: list[list[float]] = [[], []]
    for side in order:
        wait(device)
        if dist.get_world_size() > 1:
            dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        sides[side]()
        wait(device)
        wall[side].append(time.perf_counter() - start)
        cpu[side].append(time.process_time() - busy)
    return wall, cpu


def measure(name: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Validate where a step gives one pair, then time the variant and its baseline in turns."""
    sides = VARIANTS[name](device)
    if name in CHECKED:
        sides[0].check()
    for order in ORDERS:
        block(sides, order, device)  # warm
    start = time.perf_counter()
    block(sides, ORDERS[0], device)
    count = [max(LEAST_BLOCKS, round(seconds / (time.perf_counter() - start)))]
    dist.broadcast_object_list(count)  # every process makes as many
    found = [block(sides, ORDERS[i % 2], device) for i in range(count[0])]
    walls, cpus = [wall for wall, _ in found], [cpu for _, cpu in found]
    row: dict[str, Any] = {
        "what": name,
        "measured_ms": float(np.median([w[0] for w in walls])) * 1e3,
        "plain_ms": float(np.median([w[1] for w in walls])) * 1e3,
        **ratio(walls),
        "cpu_time": ratio(cpus) if device.type == "cpu" else None,
        "validated": name in CHECKED,
        "blocks": count[0],
        "load_after": os.getloadavg()[0],
    }
    return row


def written(found: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{found['ratio']:.4f}x [{found['ratio_low']:.4f}, {found['ratio_high']:.4f}]"


def report(row: dict[str, Any]) -> None:
    """Print a variant as it is done."""
    ratios = f"{row['measured_ms']:8.1f} ms  plain {row['plain_ms']:8.1f} ms  {written(row)} wall clock"
    print(f"{row['what']:28} {ratios}", flush=True)
    if row["cpu_time"]:
        print(f"{'':59}{written(row['cpu_time'])} processor time", flush=True)


def wait(device: torch.device) -> None:
    """For the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print; `--output` writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each variant")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="variants; all that apply")
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
        names = [name for name in names if not arguments.only or name in arguments.only]
        size = SIZES[device.type]
        parameters = sum(p.numel() for p in Model(size).parameters())
        if not rank:
            print(
                f"{parameters / 1e6:.1f} M parameters, {MICRO_BATCHES} micro-batches of {EXAMPLES} x {size.length}, "
                f"{world} processes"
            )
        rows: list[dict[str, Any]] = []
        record = {
            "script": "bench/noise.py",
            "device": describe(device).name,
            "kind": arguments.device,
            "threads": torch.get_num_threads(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "processes": world,
            "parameters": parameters,
            "load_before": load,
            "results": rows,
        }
        for name in names:
            rows.append(measure(name, device, arguments.seconds))
            if not rank:
                report(rows[-1])
                if arguments.output:  # after each: the run may be cut short
                    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        dist.destroy_process_group()
    if not rank:
        print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
