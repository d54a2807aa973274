// States kept in 16 or 8 bits between steps. 16: bf16, rounded stochastically. 8: Dettmers et al. 2022, "8-bit
// Optimizers via Block-wise Quantization": blocks of kStateBlock elements, each with its largest size as fp32 scale,
// and the dynamic data type, in which what a code spends on its power of ten it lacks in its fraction. Differences from
// the paper: with a sign, the largest code of both signs is 1 itself, so that what was read from 8 bits goes back to
// the same codes; without a sign, what is not 0 does not become 0, since steps divide by it.
#pragma once

#include "storage.h"

namespace pybatch::PB_ISA {

constexpr int kDecades = 7;           // powers of ten a code can say: 1 to 1e-6
constexpr uint32_t kSignBit = 0x80u;  // of a code with a sign, whose other bits are the size's

// The size that a code stands for, in shares of the scale. Codes of a decade are the middles of 1, 2, 4, ... equal
// parts of [0.1, 1], without a sign of 2, 4, 8, ...; 0 is 0 and the last one 1.
constexpr double size_of_code(int code, bool has_sign) {
    if (code == 0) return 0.0;
    if (code == (has_sign ? 127 : 255)) return 1.0;
    int number = has_sign ? code : code + 1, parts = 1;
    double power = has_sign ? 1e-6 : 1e-7;
    for (; number >= 2 * parts; parts *= 2) power *= 10.0;
    return power * (0.1 + 0.9 * (number - parts + 0.5) / parts);
}

struct Codes {
    float value[2][256];  // without and with a sign

    constexpr Codes() : value() {
        for (int code = 0; code < 256; ++code) {
            value[0][code] = float(size_of_code(code, false));
            value[1][code] = float(size_of_code(code & 127, true)) * (code < 128 ? 1.0f : -1.0f);
        }
    }
};

#ifdef __CUDACC__
#define PB_DEVICE __device__ __forceinline__  // a table of the device is not read on the host
__device__ constexpr Codes kCodes;
#else
#define PB_DEVICE PB_HD
constexpr Codes kCodes;
#endif

PB_DEVICE float value_of(uint8_t code, bool has_sign, float scale) { return kCodes.value[has_sign][code] * scale; }
#undef PB_DEVICE

// The code of x in a block of this scale: the part of its decade in which it lies.
PB_HD uint8_t code_of(float x, bool has_sign, float scale) {
    const uint32_t bits = bits_of(x), sign = has_sign ? (bits >> 24) & kSignBit : 0u;
    const float size = float_of(bits & 0x7fffffffu);
    float share =
        is_finite(scale) && scale > 0.0f ? quotient(size, scale) : 0.0f;  // a block with a NaN or infinity is all NaN
    const uint32_t last = has_sign ? 127u : 255u, least = !has_sign && size > 0.0f ? 1u : 0u;
    const bool whole = share > 0.998f;
    uint32_t parts = has_sign ? 64u : 128u;
    for (int decade = 1; decade < kDecades; ++decade) {
        const bool below = share < 0.1f;
        share = below ? share * 10.0f : share;
        parts = below ? parts / 2u : parts;
    }
    const float place = (share - 0.1f) * (float(int32_t(parts)) * (1.0f / 0.9f));
    const uint32_t part = uint32_t(int32_t(place > 0.0f ? place : 0.0f));
    uint32_t code = parts + (part < parts ? part : parts - 1u) - (has_sign ? 0u : 1u);
    // One condition at a time: GCC vectorizes choices, not what is joined by "and".
    const uint32_t lowest = parts == (has_sign ? 1u : 2u) ? least : code;
    const uint32_t highest = parts == (has_sign ? 64u : 128u) ? last : code;
    code = share < (has_sign ? 0.275f : 0.1625f) ? lowest : code;  // nearer to 0 than to the least code
    code = whole ? highest : code;
    code = share == share ? code : 0u;
    code = size == 0.0f ? 0u : code;
    return uint8_t(code | sign);
}

// Sizes as integers, whose order is that of the numbers, with NaN above infinity: the largest of a block is its scale.
PB_HD uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffffu; }
PB_HD uint32_t larger_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The key of a state's random bits, from that of its chunk.
PB_HD uint32_t state_key(uint32_t key, int state) { return mix(key, 0x73746174u + uint32_t(state)); }

}  // namespace pybatch::PB_ISA
