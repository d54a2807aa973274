"""Triton twin of narrow.h: states in fp32, in bf16 rounded at random, or in 8 bits with a scale for 256 elements."""

import triton
import triton.language as tl
from pybatch.kernels.chunk import lanes, load_as_f32, pointer
from pybatch.kernels.storage import mix, random_bits, to_bfloat16_at_random
from pybatch.kernels.table import BFLOAT16, FLOAT32, STATE_BLOCK, STATES_BF16, STATES_FP32, finite


@triton.jit
def code_of(x, has_sign: tl.constexpr, scale):
    """The code of x in a block of this scale."""
    bits = x.to(tl.uint32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    usable = finite(scale) & (scale > 0.0)
    share = tl.where(usable, size / tl.where(usable, scale, 1.0), 0.0)
    whole = share > 0.998
    top: tl.constexpr = 64 if has_sign else 128
    parts = tl.where(whole, top, top)
    for _ in tl.static_range(6):
        below = share < 0.1
        share = tl.where(below, share * 10.0, share)
        parts = tl.where(below, parts // 2, parts)
    place = (share - 0.1) * (parts.to(tl.float32) * 1.1111111640930176)
    part = tl.minimum(tl.where(place > 0.0, place, 0.0).to(tl.int32), parts - 1)
    if has_sign:
        code = tl.where((share < 0.275) & (parts == 1), 0, parts + part)
        code = tl.where(whole & (parts == top), 127, code)
    else:
        least = (size > 0.0).to(tl.int32)
        code = tl.where((share < 0.1625) & (parts == 2), least, parts + part - 1)
        code = tl.where(whole & (parts == top), 255, code)
    code = tl.where((share != share) | (size == 0.0), 0, code).to(tl.uint32)
    if has_sign:
        code = code | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def load_state(state, scales, codes, kind: tl.constexpr, has_sign, begin, offset, mask, vectors: tl.constexpr):
    """A state's fp32 values; codes: what the codes stand for, fp32 [2, 256]."""
    if kind == STATES_FP32:
        x = load_as_f32(state, FLOAT32, begin, offset, mask, vectors)
    elif kind == STATES_BF16:
        x = load_as_f32(state, BFLOAT16, begin, offset, mask, vectors)
    else:
        code = tl.load(pointer(state, tl.uint8, begin, vectors) + offset, mask=mask, other=0).to(tl.int32)
        at = pointer(scales, tl.float32, begin // STATE_BLOCK, False) + offset // STATE_BLOCK
        x = tl.load(codes + 256 * has_sign + code) * tl.load(at, mask=mask, other=0.0)
    return x


@triton.jit
def store_state(
    state,
    scales,
    value,
    kind: tl.constexpr,
    number: tl.constexpr,
    has_sign: tl.constexpr,
    begin,
    start,
    size,
    key,
    block: tl.constexpr,
    vectors: tl.constexpr,
):
    """Write back what `load_state` gave; key: `random_key` of the chunk, of bf16 only."""
    offset, mask = lanes(start, size, block, vectors)
    if kind == STATES_FP32:
        tl.store(pointer(state, tl.float32, begin, vectors) + offset, value, mask=mask)
    elif kind == STATES_BF16:
        own = mix(key, tl.full((), 0x73746174 + number, tl.uint32))
        bits = to_bfloat16_at_random(value, random_bits(own, begin, offset))
        tl.store(pointer(state, tl.uint16, begin, vectors) + offset, bits, mask=mask)
    else:
        count: tl.constexpr = block // STATE_BLOCK
        sizes = (value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)  # in the order of the numbers, NaN last
        largest = tl.max(tl.reshape(tl.where(mask, sizes, 0), (count, STATE_BLOCK)), axis=1)
        scale = largest.to(tl.float32, bitcast=True)
        each = tl.reshape(tl.broadcast_to(tl.expand_dims(scale, 1), (count, STATE_BLOCK)), (block,))
        tl.store(pointer(state, tl.uint8, begin, vectors) + offset, code_of(value, has_sign, each), mask=mask)
        tl.debug_barrier()  # every warp has read the old scales
        first = tl.arange(0, count)
        at = pointer(scales, tl.float32, begin // STATE_BLOCK, False) + start // STATE_BLOCK + first
        tl.store(at, scale, mask=first * STATE_BLOCK < size - start)
