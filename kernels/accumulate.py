"""Triton twin of accumulate.cu: add a micro-batch's gradients to their sums, with the norms of both."""

from typing import Any

import triton
import triton.language as tl
from pybatch.kernels.step import collect, collect_rows
from pybatch.kernels.table import (
    FRESH,
    GRAD,
    GRAD_TYPE,
    LAUNCH,
    SUM,
    load_as_f32,
    load_f32,
    locate,
    store_f32,
    sum_squares,
)


@triton.jit
def accumulate_kernel(rows, chunks, partials, weight: tl.float64, block: tl.constexpr):
    """One program a chunk."""
    chunk, _index, row, offset, mask = locate(rows, chunks, block)
    grad, total = tl.load(row + GRAD), tl.load(row + SUM)
    small = tl.zeros((), tl.float64)
    large = tl.zeros((), tl.float64)
    if total != 0:
        s = tl.zeros((block,), tl.float32)
        if (tl.load(row + FRESH) == 0) | (grad == 0):  # without gradient the sum stays
            s = load_f32(total, offset, mask)
        if grad != 0:
            x = load_as_f32(grad, tl.load(row + GRAD_TYPE), offset, mask)
            s = s + tl.full((), weight, tl.float64).to(tl.float32) * x
            store_f32(total, offset, s, mask)
            small = sum_squares(x)
        large = sum_squares(s)
    tl.store(partials + 2 * chunk, small)
    tl.store(partials + 2 * chunk + 1, large)


def accumulate(tensors: Any, call: Any) -> None:
    """Add the gradients of a `pybatch.ops.TensorList` to their sums."""
    count = len(tensors.chunks)
    if count:
        accumulate_kernel[(count,)](
            tensors.rows, tensors.chunks, tensors.partials, call.weight, block=tensors.table.chunk, **LAUNCH
        )
    collect(tensors, call.examples, micro=True)
    collect_rows(tensors, int(SUM.value), call.examples, gradients=True, micro=True)
