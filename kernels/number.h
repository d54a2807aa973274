// Loads and stores of the element types. Arithmetic is in fp32 throughout.
#pragma once

#include "rule.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pybatch::PB_ISA {

PB_HD float load(const float& x) { return x; }
PB_HD void store(float& to, float x) { to = x; }

#ifdef __CUDACC__

using bfloat16 = __nv_bfloat16;
using float16 = __half;
__device__ __forceinline__ float load(const bfloat16& x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ float load(const float16& x) { return __half2float(x); }
__device__ __forceinline__ void store(float16& to, float x) { to = __float2half_rn(x); }

#else

struct bfloat16 {
    uint16_t bits;
};

PB_HD float load(const bfloat16& x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

PB_HD void store(bfloat16& to, float x) {  // round to nearest even
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

#ifdef __FLT16_MAX__
#define PB_FLOAT16
struct float16 {
    _Float16 value;
};
PB_HD float load(const float16& x) { return float(x.value); }
PB_HD void store(float16& to, float x) { to.value = _Float16(x); }
#endif

#endif

}  // namespace pybatch::PB_ISA
