"""Exact per-example gradient norms: time and memory against a plain backward pass, Opacus and BackPACK.

    python bench/per_example.py [--device cpu|cuda] [--repeats N] [--case NAME ...] [--output FILE]
    python bench/per_example.py --profile [--case NAME ...]    # what the norms' time goes to, by part

The norms of all sides are compared on the same inputs before anything is timed. Forward plus backward pass, the sides
interleaved in one process; a ratio is of medians, its interval from resampling. Memory is the peak of a pass above the
model and its gradients: allocated bytes on a GPU, resident bytes of a process of its own on the CPU. A peer that is not
installed, or does not support the model, is left out with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pybatch.device.identity import describe
from pybatch.noise.per_example import ExampleRecorder, one_pass
from pybatch.noise.per_example.uses import Products


class Block(nn.Module):
    """Pre-norm attention and a two-layer network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, width] to the same."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class LastDimensionFirst(nn.Module):
    """Logits [n, t, classes] to [n, classes, t], as cross-entropy wants them."""

    def forward(self, x: Tensor) -> Tensor:
        """A view."""
        return x.transpose(1, 2)


def transformer(width: int, layers: int, length: int, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A language model of 1000 tokens; its batch."""
    blocks = [Block(width, width // 64) for _ in range(layers)]
    model = nn.Sequential(
        nn.Embedding(1000, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 1000), LastDimensionFirst()
    )
    return model, torch.randint(1000, (n, length)), torch.randint(1000, (n, length))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """Three layers of 1024 on vectors."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, torch.randn(256, 1024), torch.randint(10, (256,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """Three convolutions on images of 32 x 32."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 64, 10),
    )
    return model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "transformer, width 256, 64 tokens": lambda: transformer(256, 4, 64, 16),
    "transformer, width 512, 256 tokens": lambda: transformer(512, 2, 256, 8),
    "mlp": mlp,
    "cnn": cnn,
}
BF16 = ", bf16"  # ends the name of a case in autocast, as a GPU trains
GPU_CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "transformer, width 768, 1024 tokens" + BF16: lambda: transformer(768, 12, 1024, 16),
    "transformer, width 768, 256 tokens" + BF16: lambda: transformer(768, 12, 256, 64),
    "transformer, width 768, 1024 tokens": lambda: transformer(768, 12, 1024, 16),
}


class Plain:
    """Forward and backward pass, nothing else."""

    name = "plain"
    autocast = False  # to bf16

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y

    def loss_of(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(self.x), self.y)

    def run(self) -> Tensor | None:
        """One pass from zero gradients; |g_i|^2 [n] where it gives them."""
        self.model.zero_grad()
        self.loss_of().backward()  # type: ignore[no-untyped-call]
        return None


class Ours(Plain):
    """pybatch."""

    name = "pybatch"
    backend: str | None = None

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        self.recorder = ExampleRecorder(model, backend=self.backend)

    def run(self) -> Tensor:
        """As Plain.run."""
        with self.recorder.record(len(self.x)) as norms:
            super().run()
        return norms.total


class OursInTorch(Ours):
    """pybatch without its kernels: on a GPU the witness where no peer is installed. On a CPU it is the same."""

    name, backend = "pybatch, torch's products", "torch"


class Opacus(Plain):
    """Opacus' ghost norms: the first of the two passes of its fast gradient clipping."""

    name = "opacus"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        self.wrapped = GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
        )
        super().__init__(self.wrapped, x, y)

    def run(self) -> Tensor:
        """As Plain.run."""
        super().run()
        norms: Tensor = self.wrapped.get_norm_sample().double().square()
        return norms


class BackPack(Plain):
    """BackPACK's BatchL2Grad."""

    name = "backpack"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad

        unsupported = {type(m).__name__ for m in model.modules() if [*m.parameters(recurse=False)]}
        unsupported -= {"Linear", "Conv1d", "Conv2d", "Conv3d"}
        if unsupported:
            raise NotImplementedError(f"BatchL2Grad has no rule for {', '.join(sorted(unsupported))}")
        super().__init__(extend(model), x, y)
        self.loss, self.context = extend(nn.CrossEntropyLoss()), lambda: backpack(BatchL2Grad())

    def run(self) -> Tensor:
        """As Plain.run."""
        self.model.zero_grad()
        with self.context():
            self.loss(self.model(self.x), self.y).backward()
        parts = [p.batch_l2 for p in self.model.parameters()]  # of each example's share of the mean
        return torch.stack(parts).sum(0).double() * len(self.x) ** 2


SIDES: tuple[type[Plain], ...] = (Plain, Ours, OursInTorch, Opacus, BackPack)
AGREE, AGREE_BF16 = 1e-3, 2e-2  # relative, norms of two sides


def build(kind: type[Plain], case: str, device: torch.device) -> Plain:
    """The same model and batch for every side."""
    torch.manual_seed(0)
    model, x, y = (CASES | GPU_CASES)[case]()
    side = kind(model.to(device), x.to(device), y.to(device))
    side.autocast = case.endswith(BF16)
    return side


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def validated(case: str, device: torch.device) -> tuple[dict[str, Plain], dict[str, str]]:
    """The sides whose norms agree with pybatch's, and why the others are left out."""
    sides: dict[str, Plain] = {}
    left_out: dict[str, str] = {}
    norms: Tensor | None = None
    for kind in SIDES:
        if kind is OursInTorch and device.type == "cpu":
            continue
        try:
            side = build(kind, case, device)
            found = side.run()
        except Exception as error:  # a peer's way of saying that it does not support a model
            if kind in (Plain, Ours):
                raise
            left_out[kind.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]
            continue
        if kind is Ours:
            norms = found
        elif found is not None and norms is not None:
            worst = float((found / norms - 1).abs().max())
            if not worst < (AGREE_BF16 if case.endswith(BF16) else AGREE):
                left_out[kind.name] = f"its norms differ by up to {worst:.1e}"
                continue
        sides[kind.name] = side
    return sides, left_out


def peak_bytes(name: str, case: str, device: torch.device) -> int | None:
    """Peak memory of a pass above the model and its gradients; a process of its own on the CPU."""
    if device.type == "cuda":
        kind = next(kind for kind in SIDES if kind.name == name)
        side = build(kind, case, device)
        side.run()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        side.run()
        return torch.cuda.max_memory_allocated(device) - before
    command = [sys.executable, __file__, "--memory-of", name, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    return int(done.stdout) if done.returncode == 0 else None


def resident_peak(name: str, case: str) -> int:
    """Growth of this process's peak resident memory over one pass, after everything was imported and built."""
    side = build(next(kind for kind in SIDES if kind.name == name), case, torch.device("cpu"))
    for p in side.model.parameters():
        p.grad = torch.zeros_like(p)
    before = peak_resident()
    side.run()
    return peak_resident() - before


def peak_resident() -> int:
    """Bytes; Linux only, where it is this process's own and not its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(case: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Validate, then time all sides in turns."""
    sides, left_out = validated(case, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        for name in rng.permutation(list(sides)):
            synchronize(device)
            start = time.perf_counter()
            sides[name].run()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    table = np.array([times[name] for name in sides])
    resampled = np.median(table[:, rng.integers(repeats, size=(2000, repeats))], axis=2)
    rows = {}
    for i, name in enumerate(sides):
        low, high = np.quantile(resampled[i] / resampled[0], [0.025, 0.975])
        rows[name] = {
            "ms": statistics.median(times[name]) * 1e3,
            "ratio_to_plain": statistics.median(times[name]) / statistics.median(times["plain"]),
            "ratio_low": float(low),
            "ratio_high": float(high),
            "peak_bytes": peak_bytes(name, case, device),
        }
    return {"case": case, "repeats": repeats, "sides": rows, "left_out": left_out}


class Parts:
    """Exclusive time of functions, put in place of themselves; the device is waited for around each."""

    WATCHED: tuple[tuple[Any, str, str], ...] = (
        (Products, "single", "norms, no sequence"),
        (Products, "gram", "norms, Gram matrices"),
        (Products, "weight", "norms, products formed"),
        (Products, "fused", "weight gradient and norms, fused"),
        (Products, "picked", "norms, embeddings"),
        (one_pass, "squared_norms", "norms, biases and the rest"),
        (one_pass, "square", "norms of the mean gradient"),
        (one_pass.Pass, "_arrived", "uses taken, norm layers and bias sums"),
        (one_pass.Pass, "_complete", "gates"),
    )

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock = device, clock(device)
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # time of functions within the one under way

    def __enter__(self) -> Parts:
        self.seconds = {}
        self._kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self.WATCHED]
        for owner, name, label in self.WATCHED:
            setattr(owner, name, self._timed(getattr(owner, name), label))
        return self

    def __exit__(self, *_: Any) -> None:
        for owner, name, function in self._kept:
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            synchronize(self.device)
            start = self.clock()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                synchronize(self.device)
                whole = self.clock() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + whole - self._inner.pop()
                self._inner[-1] += whole

        return timed


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of the wall; on a CPU of this process's processor time, which neighbours take less from."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def profile(case: str, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds (processor time on a CPU): plain forward and backward pass, ours, and each part of ours."""
    plain, ours = build(Plain, case, device), build(Ours, case, device)
    assert isinstance(ours, Ours)
    rows: dict[str, list[float]] = {}
    now = clock(device)

    def passes(side: Plain, name: str) -> None:
        side.model.zero_grad()
        synchronize(device)
        start = now()
        loss = side.loss_of()
        synchronize(device)
        middle = now()
        loss.backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        rows.setdefault(f"{name}, forward", []).append(middle - start)
        rows.setdefault(f"{name}, backward", []).append(now() - middle)

    def recorded(name: str) -> None:
        with ours.recorder.record(len(ours.x)):
            passes(ours, name)

    for i in range(repeats + 2):
        if i == 2:  # warm
            rows.clear()
        passes(plain, "plain")
        recorded("pybatch")
        with Parts(device) as parts:
            recorded("pybatch, parts timed")
        for label, seconds in parts.seconds.items():
            rows.setdefault(f"  {label}", []).append(seconds)
    return {label: statistics.median(values) * 1e3 for label, values in rows.items()}


def write(output: Path, device: torch.device, load: float, results: list[dict[str, Any]]) -> None:
    """The JSON of the cases so far."""
    record = {
        "script": "bench/per_example.py",
        "device": describe(device).name,
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "load": load,
        "torch": torch.__version__,
        "results": results,
    }
    output.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Measure and print; `--output` writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--case", nargs="*", choices=[*CASES, *GPU_CASES])
    parser.add_argument("--profile", action="store_true", help="time by part, nothing else")
    parser.add_argument("--memory-of", choices=[kind.name for kind in SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers', of torch's newer versions
    if arguments.memory_of:
        print(resident_peak(arguments.memory_of, arguments.case[0]))
        return
    device = torch.device(arguments.device)
    cases = arguments.case or [*(GPU_CASES if device.type == "cuda" else ()), *CASES]  # in case the run is cut short
    load = os.getloadavg()[0]
    if arguments.profile:
        for case in cases:
            print(case)
            for label, ms in profile(case, device, arguments.repeats).items():
                print(f"  {label:42}{ms:9.2f} ms")
        print(f"threads {torch.get_num_threads()}, load before {load:.1f}")
        return
    results: list[dict[str, Any]] = []
    for case in cases:
        found = measure(case, device, arguments.repeats)
        results.append(found)
        if arguments.output:  # after each: the run may be cut short
            write(arguments.output, device, load, results)
        print(case, flush=True)
        for name, row in found["sides"].items():
            memory = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            print(
                f"  {name:10}{row['ms']:9.2f} ms  {row['ratio_to_plain']:5.2f}x "
                f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]  {memory:>9}"
            )
        if not set(found["sides"]) - {"plain", "pybatch"}:
            print("  no other side gives these norms: they are not validated here")
        for name, why in found["left_out"].items():
            print(f"  {name:10} left out: {why}")
    print(f"threads {torch.get_num_threads()}, load before {load:.1f}")


if __name__ == "__main__":
    main()
