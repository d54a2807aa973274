"""What bounds AdamW's update: its arithmetic, or memory? The same pass on data in the cache and on 32 M elements.

    python bench/arithmetic.py

Compiled passes alone, without the checks of a step: ours and `torch._fused_adamw_`, interleaved, medians on the CPU.
Where data in the cache is updated much faster than data in memory, memory is the bound of the latter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from pybatch import ops

SIZES = (1 << 17, 1 << 18, 1 << 19, 1 << 25)  # elements of 16 bytes with gradient and states: 2 to 8 MiB, and 512 MiB
REPEATS = 9
BYTES = 28  # of the byte model: parameter and two states read and written, gradient read


def timed(work: Callable[[], object], count: int) -> float:
    """Seconds of one call, over `count` of them."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def passes(size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Our update of one tensor and torch's, each on data of its own."""
    param, peer = (torch.nn.Parameter(torch.randn(size)) for _ in range(2))
    grad = torch.randn(size)
    own = grad.clone()
    entry = ops.Entry(param.detach(), (torch.zeros(size), torch.zeros(size)), "AdamW", 0, 0.0)
    backend = ops.CppBackend()
    tensors = ops.TensorList([entry], 1, ops.Ledger(torch.device("cpu")), backend.chunk)
    hyper = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
    tensors.set_hyper([ops.RULES["AdamW"].row(1e-3, hyper)])
    tensors.set("grad", [own.data_ptr()])
    call = ops.Call()
    call.inverse = 1.0
    first, second, step = torch.zeros(size), torch.zeros(size), torch.zeros(())
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-2, "eps": 1e-8}

    def theirs() -> None:
        torch._fused_adamw_([peer], [grad], [first], [second], [], [step], amsgrad=False, maximize=False, **options)

    with torch.no_grad():
        before = param.detach().clone()
        backend.step(tensors, call)
        assert not torch.equal(before, param), "the pass did nothing"

    def ours(kept: object = (param, own)) -> None:  # the table holds their addresses only
        backend.step(tensors, call)

    return ours, theirs


@torch.no_grad()
def main() -> None:
    """Print time per element and bytes per second of the byte model."""
    print(f"{torch.get_num_threads()} threads, {ops.build().cpu_width}")
    for size in SIZES:
        with torch.enable_grad():
            ours, theirs = passes(size)
        count = max(3, (1 << 24) // size)
        pairs = [(timed(ours, count), timed(theirs, count)) for _ in range(REPEATS)]
        cells = []
        for name, seconds in zip(
            ("pybatch", "torch fused"), map(statistics.median, zip(*pairs, strict=True)), strict=True
        ):
            cells.append(f"{name} {1e9 * seconds / size:.3f} ns/element, {BYTES * size / seconds / 1e9:.0f} GB/s")
        print(f"{size:>9} elements: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
