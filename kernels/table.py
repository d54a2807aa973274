"""Triton twin of table.h: the same constants (a test compares them), and loads through the table's addresses."""

import triton
import triton.language as tl

PARAM, GRAD, SUM, STATE0, MASTER = (tl.constexpr(i) for i in (0, 1, 2, 3, 6))
NUMEL, CODE, GRAD_TYPE, GROUP, FRESH, SALT, COLUMNS = (tl.constexpr(i) for i in range(7, 14))
FLOAT32, BFLOAT16, FLOAT16 = (tl.constexpr(i) for i in range(3))  # storages and types of gradients
BFLOAT16_MASTER, FLOAT16_MASTER, BFLOAT16_REMAINDER = (tl.constexpr(i) for i in range(3, 6))
BFLOAT16_STOCHASTIC, FLOAT16_STOCHASTIC, STORAGES = (tl.constexpr(i) for i in range(6, 9))
SUM_SQ, BAD, MICRO_SQ, NORM, CLIP, SKIPPED, PAIRS = (tl.constexpr(i) for i in range(7))
SMALL_SUM, LARGE_SUM, RING_STEPS, RING_LENGTH, SKIP = (tl.constexpr(i) for i in range(7, 12))
RING_ROWS = tl.constexpr(256)
LAYER_MICRO_SQ, LAYER_SUM_SQ, LAYER_RING = (tl.constexpr(i) for i in range(3))
LAYER_BLOCKS, LAYER_SIZE = tl.constexpr(32), tl.constexpr(98)
PARAM_SQ, DIRECTION_SQ, ROW_NORMS = (tl.constexpr(i) for i in range(3))
HYPER_COLUMNS, MAXIMIZE, HYPER_OWN = (tl.constexpr(i) for i in (8, 1, 2))
# Said at every launch, because the default changes in Triton 3.10.
LAUNCH = {"enable_fp_fusion": True}


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, for 0 <= base < 1."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def load_f32(address, offset, mask):
    """Elements of an fp32 tensor given by its address."""
    return tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0.0)


@triton.jit
def store_f32(address, offset, value, mask):
    """Store to an fp32 tensor given by its address."""
    tl.store(address.to(tl.pointer_type(tl.float32)) + offset, value, mask=mask)


@triton.jit
def load_as_f32(address, dtype, offset, mask):
    """Elements of a tensor of any of the three dtypes, as fp32; the branch is uniform over the program."""
    if dtype == FLOAT32:
        x = load_f32(address, offset, mask)
    elif dtype == BFLOAT16:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + offset, mask=mask, other=0).to(tl.uint32)
        x = (bits << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def sum_squares(x):
    """Sum of squares in fp32 as float64; NaN where an element is not finite, which an overflow alone is not."""
    return tl.sum(x * x).to(tl.float64) + tl.sum(x * 0.0).to(tl.float64)


@triton.jit
def contains(numbers: tl.constexpr, number):
    """Whether a tuple of constants holds the number."""
    found = number < 0
    for i in tl.static_range(len(numbers)):
        found = found | (number == numbers[i])
    return found


@triton.jit
def locate(rows, chunks, block: tl.constexpr):
    """(chunk, index of its row, address of that row, offsets of the elements, which of them exist) of this program."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * chunk)
    row = rows + index * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * block + tl.arange(0, block)
    return chunk, index, row, offset, offset < tl.load(row + NUMEL)


@triton.jit
def row_sums(partials, starts, row, block: tl.constexpr):
    """Both sums of a row's chunks, in a fixed order."""
    lanes = tl.arange(0, block)
    first, second = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, block):
        chunk = start + lanes
        first += tl.load(partials + 2 * chunk, mask=chunk < end, other=0.0)
        second += tl.load(partials + 2 * chunk + 1, mask=chunk < end, other=0.0)
    return tl.sum(first), tl.sum(second)
