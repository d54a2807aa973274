"""Triton twin of accumulate.cu: add a micro-batch's gradients to their sums, with the norms of both."""

from typing import Any

import triton
import triton.language as tl
from pybatch.kernels.chunk import add_squares, in_vectors, lanes, load_as_f32, locate, pointer, squares, total_squares
from pybatch.kernels.step import collect, collect_rows, shape
from pybatch.kernels.table import FLOAT32, FRESH, GRAD, GRAD_TYPE, LAUNCH, SUM


@triton.jit
def accumulate_block(
    grad, total, fresh, weight, dtype: tl.constexpr, begin, start, size, block: tl.constexpr, vectors: tl.constexpr
):
    """Add a block of the gradient to the sum; returns both."""
    offset, mask = lanes(start, size, block, vectors)
    x = load_as_f32(grad, dtype, begin, offset, mask, vectors)
    held = mask & (tl.full((block,), fresh, tl.int64) == 0)  # of a scalar the interpreter makes no mask
    s = load_as_f32(total, FLOAT32, begin, offset, held, vectors)
    s = s + weight * x
    tl.store(pointer(total, tl.float32, begin, vectors) + offset, s, mask=mask)
    return x, s


@triton.jit
def accumulate_kernel(
    rows,
    chunks,
    partials,
    weight: tl.float64,
    types: tl.constexpr,
    block: tl.constexpr,
    chunk_size: tl.constexpr,
):
    """One program a chunk; types: of the gradients of the list."""
    chunk, _index, row, begin, size = locate(rows, chunks, chunk_size)
    grad, total = tl.load(row + GRAD), tl.load(row + SUM)
    dtype, fresh = tl.load(row + GRAD_TYPE), tl.load(row + FRESH)
    small, large = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    if (total != 0) & (grad == 0):  # without gradient the sum stays
        large = squares(total, FLOAT32, begin, size, block)
    factor = tl.full((), weight, tl.float64).to(tl.float32)
    for i in tl.static_range(len(types)):
        if (total != 0) & (grad != 0) & (dtype == types[i]):
            a0, a1, a2 = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
            b0, b1, b2 = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
            whole = in_vectors(grad | total, size, block)
            for start in range(0, whole, block):
                x, s = accumulate_block(grad, total, fresh, factor, types[i], begin, start, size, block, True)
                a0, a1, a2 = add_squares(a0, a1, a2, x)
                b0, b1, b2 = add_squares(b0, b1, b2, s)
            for start in range(whole, size, block):
                x, s = accumulate_block(grad, total, fresh, factor, types[i], begin, start, size, block, False)
                a0, a1, a2 = add_squares(a0, a1, a2, x)
                b0, b1, b2 = add_squares(b0, b1, b2, s)
            small, large = total_squares(a0, a1, a2), total_squares(b0, b1, b2)
    tl.store(partials + 2 * chunk, small)
    tl.store(partials + 2 * chunk + 1, large)


def accumulate(tensors: Any, call: Any) -> None:
    """Add the gradients of a `pybatch.ops.TensorList` to their sums."""
    count = len(tensors.chunks)
    if count:
        types = tuple(sorted({dtype for _code, dtype in tensors.kinds(accumulated=False)}))
        accumulate_kernel[(count,)](
            tensors.rows, tensors.chunks, tensors.partials, call.weight, types=types, **shape(tensors), **LAUNCH
        )
    collect(tensors, call.examples, micro=True)
    collect_rows(tensors, int(SUM.value), call.examples, gradients=True, micro=True)
