"""Triton twin of chunk.cuh: a program's chunk of a tensor, a block of elements at a time, and its sums of squares.

Whole blocks of tensors that lie on 16 bytes are accessed by vectors, without a mask; the rest, and all of the others,
element by element.
"""

import triton
import triton.language as tl
from pybatch.kernels.table import BFLOAT16, COLUMNS, FLOAT32, NUMEL, finite


@triton.jit
def locate(rows, chunks, chunk_size: tl.constexpr):
    """(number of the program's chunk, index of its row, address of that row, its first element, how many it has)."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * chunk)
    row = rows + index * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * chunk_size
    return chunk, index, row, begin, tl.minimum(tl.load(row + NUMEL) - begin, chunk_size).to(tl.int32)


@triton.jit
def in_vectors(addresses, size, block: tl.constexpr):
    """How many of a chunk's elements are accessed by vectors; addresses: of all its tensors, or-ed."""
    return tl.where(addresses % 16 == 0, size // block * block, 0)


@triton.jit
def lanes(start, size, block: tl.constexpr, vectors: tl.constexpr):
    """(the elements of a block of the chunk, which of them exist)."""
    offset = start + tl.arange(0, block)
    return offset, tl.full((block,), True, tl.int1) if vectors else offset < size


@triton.jit
def pointer(address, element: tl.constexpr, begin, vectors: tl.constexpr):
    """To element `begin` of a tensor; of it, not of its address, the compiler must know that it lies on 16 bytes."""
    at = address.to(tl.pointer_type(element)) + begin
    if vectors:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def load_as_f32(address, dtype: tl.constexpr, begin, offset, mask, vectors: tl.constexpr):
    """Elements of a tensor of any of the three dtypes, as fp32."""
    if dtype == FLOAT32:
        x = tl.load(pointer(address, tl.float32, begin, vectors) + offset, mask=mask, other=0.0)
    elif dtype == BFLOAT16:
        bits = tl.load(pointer(address, tl.uint16, begin, vectors) + offset, mask=mask, other=0).to(tl.uint32)
        x = (bits << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(pointer(address, tl.float16, begin, vectors) + offset, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def add_squares(middle, large, small, x):
    """Sums of squares of any fp32 elements, in fp32: squares of large and of small ones leave its range, so that they
    are summed scaled as well (Blue 1978)."""
    down, up = x * 8.271806125530277e-25, x * 1.2676506002282294e30  # 2^-80, 2^100
    return middle + x * x, large + down * down, small + up * up


@triton.jit
def total_squares(middle, large, small):
    """Of blocks of such sums, as float64; infinite or NaN where an element is, and nowhere else."""
    middle, large, small = tl.sum(middle), tl.sum(large), tl.sum(small)
    total = tl.where(
        middle < 8.077935669463161e-28, small.to(tl.float64) * 6.223015277861142e-61, middle
    )  # 2^-90, -200
    total = tl.where(middle < 1.329227995784916e36, total, large.to(tl.float64) * 1.461501637330903e48)  # 2^120, 160
    return tl.where(finite(large), total, large.to(tl.float64))


@triton.jit
def squares(address, dtype: tl.constexpr, begin, size, block: tl.constexpr):
    """Sum of squares of a chunk of a tensor of any of the three dtypes."""
    middle, large, small = (
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
    )
    whole = in_vectors(address, size, block)
    for start in range(0, whole, block):
        offset, mask = lanes(start, size, block, True)
        x = load_as_f32(address, dtype, begin, offset, mask, True)
        middle, large, small = add_squares(middle, large, small, x)
    for start in range(whole, size, block):
        offset, mask = lanes(start, size, block, False)
        x = load_as_f32(address, dtype, begin, offset, mask, False)
        middle, large, small = add_squares(middle, large, small, x)
    return total_squares(middle, large, small)
