"""Triton twin of accumulate.cu: add a micro-batch's gradients to their sums, with the norms of both."""

from typing import Any

import triton
import triton.language as tl
from pybatch.kernels.ledger import collect_kernel
from pybatch.kernels.table import (
    CODE,
    COLUMNS,
    DTYPES,
    FRESH,
    GRAD,
    LAUNCH,
    NUMEL,
    SUM,
    load_as_f32,
    load_f32,
    store_f32,
    sum_squares,
)


@triton.jit
def accumulate_kernel(rows, chunks, partials, weight: tl.float64, block: tl.constexpr):
    """One program a chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * chunk) * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * block + tl.arange(0, block)
    mask = offset < tl.load(row + NUMEL)
    grad, total = tl.load(row + GRAD), tl.load(row + SUM)
    small = tl.zeros((), tl.float64)
    large = tl.zeros((), tl.float64)
    if total != 0:
        s = tl.zeros((block,), tl.float32)
        if tl.load(row + FRESH) == 0:
            s = load_f32(total, offset, mask)
        if grad != 0:
            x = load_as_f32(grad, tl.load(row + CODE) % DTYPES, offset, mask)
            s = s + tl.full((), weight, tl.float64).to(tl.float32) * x
            store_f32(total, offset, s, mask)
            small = sum_squares(x)
        large = sum_squares(s)
    tl.store(partials + 2 * chunk, small)
    tl.store(partials + 2 * chunk + 1, large)


def accumulate(tensors: Any, call: Any) -> None:
    """Add the gradients of a `pybatch.ops.TensorList` to their sums."""
    count = len(tensors.chunks)
    ledger = tensors.ledger.values
    if count:
        accumulate_kernel[(count,)](
            tensors.rows, tensors.chunks, tensors.partials, call.weight, block=tensors.table.chunk, **LAUNCH
        )
    collect_kernel[(1,)](tensors.partials, ledger, count, call.examples, micro=True, block=1024, **LAUNCH)
