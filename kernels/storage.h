// How a parameter is kept between steps: splitting an fp32 value into 16 bits and a remainder, and stochastic rounding.
// Element by element, the same bits on every backend.
#pragma once

#include "number.h"
#include "table.h"

namespace pybatch::PB_ISA {

PB_HD uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
PB_HD float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

PB_HD constexpr bool has_master(int64_t storage) { return storage == kBFloat16Master || storage == kFloat16Master; }
PB_HD constexpr bool is_stochastic(int64_t storage) {
    return storage == kBFloat16Stochastic || storage == kFloat16Stochastic;
}

// bf16 plus remainder: the high half is the value rounded to the nearest bf16 (ties away from zero, the only way that
// leaves 16 bits), the low half is signed: negative where the high half was rounded up. Every number and infinity comes
// back exactly, and NaN as NaN.
PB_HD float join(uint16_t high, int16_t low) { return float_of((uint32_t(high) << 16) + uint32_t(int32_t(low))); }

PB_HD void split(float x, uint16_t& high, int16_t& low) {
    const uint32_t bits = x != x ? 0x7fc00000u : bits_of(x);
    high = uint16_t((bits + 0x8000u) >> 16);
    low = int16_t(bits & 0xffffu);
}

// Counter-based random bits: a chain of MurmurHash3's 32-bit finalizer (Appleby 2011) over the words of the counter.
PB_HD uint32_t mix(uint32_t key, uint32_t word) {
    uint32_t h = (key ^ word) + 0x9e3779b9u;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}

// The key of a tensor's chunk in one step (1, 2, ...). A chunk does not cross a multiple of 2^32 elements.
PB_HD uint32_t random_key(uint64_t seed, int64_t salt, double step, int64_t begin) {
    uint32_t key = mix(mix(0u, uint32_t(seed)), uint32_t(seed >> 32));
    key = mix(mix(key, uint32_t(salt)), uint32_t(step));
    return mix(key, uint32_t(uint64_t(begin) >> 32));
}

// Random bits of an element; index counts from the tensor's beginning.
PB_HD uint32_t random_bits(uint32_t key, int64_t index) { return mix(key, uint32_t(index)); }

PB_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// The bits of one of the two neighbouring bf16: away from zero with the probability of the distance from the other.
PB_HD uint16_t round_to_bfloat16(float x, uint32_t random) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = is_finite(x) ? bits + (random & 0xffffu) : x != x ? 0x7fc00000u : bits;
    return uint16_t(rounded >> 16);
}

// One of the two neighbouring fp16, as fp32; past the largest one infinity. Below 2^-14, where fp16 has a fixed spacing
// of 2^-24, the probability is cut to 16 bits.
PB_HD float round_to_float16(float x, uint32_t random) {
    const uint32_t bits = bits_of(x), sign = bits & 0x80000000u;
    const float size = float_of(bits ^ sign);
    const float normal = float_of(((bits ^ sign) + (random & 0x1fffu)) & ~0x1fffu);
    // Bounded, so that the conversion is defined where the other branch is taken.
    const float spacings = (size < 0x1p-14f ? size : 0.0f) * 0x1p40f;
    const float small = float(int32_t((uint32_t(int32_t(spacings)) + (random & 0xffffu)) >> 16)) * 0x1p-24f;
    const float rounded = size < 0x1p-14f ? small : normal;
    return is_finite(x) ? float_of(bits_of(rounded) | sign) : x;
}

}  // namespace pybatch::PB_ISA
