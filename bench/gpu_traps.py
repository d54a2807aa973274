"""The trap list through every optimizer's CUDA passes, small enough for compute-sanitizer: what gpu_check.py runs.

    compute-sanitizer --tool memcheck python bench/gpu_traps.py

Empty, 0-d, misaligned, strided and permuted tensors, and sizes around a chunk's end; plain steps, accumulation with
noise, and a step with an infinity. Compares with the CPU pass, so that a clean run is also a right one.
"""

from __future__ import annotations

import sys

import torch
from cases import problem  # tests/ is on the path

from pybatch import optim

OPTIMIZERS = [getattr(optim, name) for name in optim.__all__ if name != "FusedOptimizer"]
# Of the movement: fp32 rounds elsewhere on a GPU, 16-bit parameters by a unit; Newton-Schulz of Muon is in bf16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
MUON_TOLERANCE = 0.2
LR = {"LARS": 10.0}  # its trust ratio makes steps small


def train(kind: type[torch.optim.Optimizer], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Four steps: plain, accumulated twice, one with an infinity, plain. The chunk is the CUDA backend's on both."""
    params = problem.tensors(dtype, device, backend="cuda")  # made there: a copy would be aligned and without gaps
    opt = kind(params, lr=LR.get(kind.__name__, 0.05), max_grad_norm=5.0, noise=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for _ in range(2 if step == 1 else 1):
            problem.give_gradients(params, generator)
            if step == 2:
                params[5].grad.view(-1)[-1] = torch.inf
            if step == 1:
                opt.accumulate(4)
        opt.step()
    assert opt.skipped == 1, f"{kind.__name__}: {opt.skipped} steps skipped, not 1"
    return [p.detach().cpu().double() for p in params]


def main() -> int:
    """Print the deviation of each optimizer; exit status 1 where one is too large."""
    failed = False
    for kind in OPTIMIZERS:
        for dtype in problem.DTYPES:
            start = [p.detach().double() for p in problem.tensors(dtype, "cpu", backend="cuda")]
            ours, wanted = train(kind, "cuda", dtype), train(kind, "cpu", dtype)
            error = sum(float((a - b).abs().sum()) for a, b in zip(ours, wanted, strict=True))
            moved = sum(float((b - s).abs().sum()) for b, s in zip(wanted, start, strict=True))
            allowed = MUON_TOLERANCE if kind is optim.Muon else TOLERANCE[dtype]
            failed |= not error <= allowed * moved
            print(
                f"{kind.__name__:6} {dtype!s:15} deviates by {error / moved:.1e} of the movement, allowed {allowed:g}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
