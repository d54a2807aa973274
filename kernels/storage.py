"""Triton twin of storage.h: how a parameter is kept between steps. bf16 is rounded in integers, so that the
interpreter, whose conversion truncates, gives the bits of a GPU."""

import triton
import triton.language as tl
from pybatch.kernels.chunk import load_as_f32, pointer
from pybatch.kernels.table import (
    BFLOAT16,
    BFLOAT16_MASTER,
    BFLOAT16_REMAINDER,
    BFLOAT16_STOCHASTIC,
    FLOAT16,
    FLOAT16_MASTER,
    FLOAT16_STOCHASTIC,
    FLOAT32,
)


@triton.jit
def mix(key, word):
    """One link of the chain of MurmurHash3 finalizers, on uint32."""
    h = (key ^ word) + 0x9E3779B9
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def random_key(seed_low, seed_high, salt, step, begin):
    """Of a chunk, in the tensor's update of this number."""
    key = mix(tl.zeros((), tl.uint32), seed_low.to(tl.uint32))
    key = mix(mix(mix(key, seed_high.to(tl.uint32)), salt.to(tl.uint32)), step.to(tl.uint32))
    return mix(key, (begin >> 32).to(tl.uint32))


@triton.jit
def random_bits(key, begin, offset):
    """Random uint32 of elements of a chunk."""
    return mix(key, begin.to(tl.uint32) + offset.to(tl.uint32))


@triton.jit
def is_finite(bits):
    """Of the fp32 with these bits."""
    return (bits & 0x7F800000) != 0x7F800000


@triton.jit
def to_bfloat16(x):
    """Bits of the nearest bf16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def to_bfloat16_at_random(x, random):
    """Bits of one of the two neighbouring bf16, up with the probability of the distance."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where(is_finite(bits), bits + (random & 0xFFFF), bits)
    return tl.where(x != x, 0x7FC0, rounded >> 16).to(tl.uint16)


@triton.jit
def to_float16_at_random(x, random):
    """One of the two neighbouring fp16, as fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = bits & 0x80000000
    size = (bits ^ sign).to(tl.float32, bitcast=True)
    normal = (((bits ^ sign) + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
    tiny = size < 6.103515625e-05  # 2^-14: a fixed spacing of 2^-24 from here down
    spacings = (tl.where(tiny, size, 0.0) * 1099511627776.0).to(tl.int32).to(tl.uint32)  # in 2^-40
    small = ((spacings + (random & 0xFFFF)) >> 16).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    rounded = tl.where(tiny, small, normal).to(tl.uint32, bitcast=True) | sign
    return tl.where(is_finite(bits), rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def load_param(param, master, storage: tl.constexpr, begin, offset, mask, vectors: tl.constexpr):
    """The parameter's fp32 values."""
    if storage == BFLOAT16_MASTER or storage == FLOAT16_MASTER:  # noqa: SIM109  nor "in"
        x = load_as_f32(master, FLOAT32, begin, offset, mask, vectors)
    elif storage == BFLOAT16_REMAINDER:
        high = tl.load(pointer(param, tl.uint16, begin, vectors) + offset, mask=mask, other=0).to(tl.uint32)
        low = tl.load(pointer(master, tl.int16, begin, vectors) + offset, mask=mask, other=0).to(tl.int32)
        x = ((high << 16) + low.to(tl.uint32)).to(tl.float32, bitcast=True)
    elif storage == BFLOAT16_STOCHASTIC:
        x = load_as_f32(param, BFLOAT16, begin, offset, mask, vectors)
    elif storage == FLOAT16_STOCHASTIC:
        x = load_as_f32(param, FLOAT16, begin, offset, mask, vectors)
    else:
        x = load_as_f32(param, storage, begin, offset, mask, vectors)
    return x


@triton.jit
def store_param(param, master, storage: tl.constexpr, begin, offset, value, mask, key, vectors: tl.constexpr):
    """Write back what `load_param` gave; key: `random_key` of the chunk, where the storage is stochastic."""
    if storage == FLOAT32:
        tl.store(pointer(param, tl.float32, begin, vectors) + offset, value, mask=mask)
    elif storage == BFLOAT16 or storage == BFLOAT16_MASTER:  # noqa: SIM109  nor "in"
        tl.store(pointer(param, tl.uint16, begin, vectors) + offset, to_bfloat16(value), mask=mask)
    elif storage == BFLOAT16_STOCHASTIC:
        bits = to_bfloat16_at_random(value, random_bits(key, begin, offset))
        tl.store(pointer(param, tl.uint16, begin, vectors) + offset, bits, mask=mask)
    elif storage == BFLOAT16_REMAINDER:
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.uint32, bitcast=True))
        tl.store(pointer(param, tl.uint16, begin, vectors) + offset, ((bits + 0x8000) >> 16).to(tl.uint16), mask=mask)
        tl.store(pointer(master, tl.uint16, begin, vectors) + offset, (bits & 0xFFFF).to(tl.uint16), mask=mask)
    else:
        x = value
        if storage == FLOAT16_STOCHASTIC:
            x = to_float16_at_random(value, random_bits(key, begin, offset))
        tl.store(pointer(param, tl.float16, begin, vectors) + offset, x.to(tl.float16), mask=mask)
    if storage == BFLOAT16_MASTER or storage == FLOAT16_MASTER:  # noqa: SIM109  nor "in"
        tl.store(pointer(master, tl.float32, begin, vectors) + offset, value, mask=mask)


@triton.constexpr_function
def is_stochastic(storage):
    """Whether its rounding draws random bits."""
    return storage in (BFLOAT16_STOCHASTIC.value, FLOAT16_STOCHASTIC.value)
