"""Triton twin of table.h: the same constants (a test compares them), and loads through the table's addresses."""

import triton
import triton.language as tl

PARAM, GRAD, SUM, STATE0, NUMEL, CODE, GROUP, FRESH, COLUMNS = (tl.constexpr(i) for i in (0, 1, 2, 3, 6, 7, 8, 9, 10))
FLOAT32, BFLOAT16, FLOAT16, DTYPES = (tl.constexpr(i) for i in range(4))
SUM_SQ, BAD, MICRO_SQ, NORM, CLIP, SKIPPED, PAIRS = (tl.constexpr(i) for i in range(7))
SMALL_SUM, LARGE_SUM, RING_STEPS, RING_LENGTH = (tl.constexpr(i) for i in range(7, 11))
RING_ROWS = tl.constexpr(256)
HYPER_COLUMNS, MAXIMIZE, HYPER_OWN = (tl.constexpr(i) for i in (8, 1, 2))
# Said at every launch, because the default changes in Triton 3.10.
LAUNCH = {"enable_fp_fusion": True}
SGD, SGD_MOMENTUM, ADAMW, ADAMW_AMSGRAD = (tl.constexpr(i) for i in range(4))


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
    """Elements of a tensor of any of the dtypes, as fp32; the branch is uniform over the program."""
    if dtype == FLOAT32:
        x = load_f32(address, offset, mask)
    elif dtype == BFLOAT16:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_from_f32(address, dtype, offset, value, mask):
    """Store fp32 values to a tensor of any of the dtypes, rounded to nearest even."""
    if dtype == FLOAT32:
        store_f32(address, offset, value, mask)
    elif dtype == BFLOAT16:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offset, value.to(tl.bfloat16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, value.to(tl.float16), mask=mask)


@triton.jit
def sum_squares(x):
    """Sum of squares in fp32 as float64; NaN where an element is not finite, which an overflow alone is not."""
    return tl.sum(x * x).to(tl.float64) + tl.sum(x * 0.0).to(tl.float64)
