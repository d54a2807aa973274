// Elements of a chunk as fp32 values, whatever they are stored as. Raw bits are fetched first and converted later, in
// registers: a conversion inside the branch that chooses the load would wait there for memory.
#pragma once

#include "chunk.cuh"
#include "number.h"
#include "storage.h"

namespace pybatch::PB_ISA {

// fp32 parameter and gradient: every address and type is known to the compiler.
struct Plain {
    float* param;
    const float* grad;
    bool grad_vectors;

    __device__ Plain(const Chunk& chunk, int source, uint32_t)
        : param(chunk.at<float>(kParam)), grad(chunk.at<const float>(source)), grad_vectors(aligned(grad)) {}

    template <int N>
    struct Bits {
        Pack<float, N> param, grad;
    };

    template <int N>
    __device__ void fetch_param(Bits<N>& bits, int i) const {
        bits.param = fetch<N>(param + i, true);
    }
    template <int N>
    __device__ void fetch_grad(Bits<N>& bits, int i) const {
        bits.grad = fetch<N>(grad + i, grad_vectors);
    }
    template <int N>
    __device__ float param_of(const Bits<N>& bits, int j) const {
        return bits.param.item[j];
    }
    template <int N>
    __device__ float grad_of(const Bits<N>& bits, int j) const {
        return bits.grad.item[j];
    }
    template <int N>
    __device__ void put(int i, Pack<float, N>& values) const {
        write(param + i, values);
    }
};

__device__ inline float widen(uint16_t bits, bool brain) {
    return brain ? load(__builtin_bit_cast(bfloat16, bits)) : load(__builtin_bit_cast(float16, bits));
}

template <class T>
__device__ inline uint16_t narrow(float x) {
    T value;
    store(value, x);
    return __builtin_bit_cast(uint16_t, value);
}

// Any other storage, or a gradient of 16 bits. Every branch is the same for the whole block.
struct Stored {
    float* wide;     // the fp32 truth: parameter or master; null where it is in 16 bits
    uint16_t* half;  // 16-bit parameter, or null
    int16_t* low;    // its remainder, or null
    bool brain, stochastic;
    const float* wide_grad;
    const uint16_t* half_grad;
    bool brain_grad, grad_vectors;
    uint32_t key, begin;

    // random: random_key() of the chunk, where the storage is stochastic.
    __device__ Stored(const Chunk& chunk, int source, uint32_t random) : key(random), begin(uint32_t(chunk.begin)) {
        const int64_t storage = chunk.storage();
        wide = storage == kFloat32 ? chunk.at<float>(kParam) : has_master(storage) ? chunk.at<float>(kMaster) : nullptr;
        half = storage == kFloat32 ? nullptr : chunk.at<uint16_t>(kParam);
        low = storage == kBFloat16Remainder ? chunk.at<int16_t>(kMaster) : nullptr;
        brain = storage != kFloat16 && storage != kFloat16Master && storage != kFloat16Stochastic;
        stochastic = is_stochastic(storage);
        const int type = source == kSum ? int(kGradFloat32) : int(chunk.row[kGradType]);
        brain_grad = type == kGradBFloat16;
        wide_grad = type == kGradFloat32 ? chunk.at<const float>(source) : nullptr;
        half_grad = type == kGradFloat32 ? nullptr : chunk.at<const uint16_t>(source);
        grad_vectors = wide_grad ? aligned(wide_grad) : aligned(half_grad);
    }

    template <int N>
    struct Bits {
        Pack<float, N> wide, wide_grad;
        Pack<uint16_t, N> half, half_grad;
        Pack<int16_t, N> low;
    };

    template <int N>
    __device__ void fetch_param(Bits<N>& bits, int i) const {
        if (wide) {
            bits.wide = fetch<N>(wide + i, true);
        } else {
            bits.half = fetch<N>(half + i, true);
            if (low) bits.low = fetch<N>(low + i, true);
        }
    }
    template <int N>
    __device__ void fetch_grad(Bits<N>& bits, int i) const {
        if (wide_grad)
            bits.wide_grad = fetch<N>(wide_grad + i, grad_vectors);
        else
            bits.half_grad = fetch<N>(half_grad + i, grad_vectors);
    }
    template <int N>
    __device__ float param_of(const Bits<N>& bits, int j) const {
        if (wide) return bits.wide.item[j];
        return low ? join(bits.half.item[j], bits.low.item[j]) : widen(bits.half.item[j], brain);
    }
    template <int N>
    __device__ float grad_of(const Bits<N>& bits, int j) const {
        return wide_grad ? bits.wide_grad.item[j] : widen(bits.half_grad.item[j], brain_grad);
    }
    // Leaves in `values` what param_of() will give from now on.
    template <int N>
    __device__ void put(int i, Pack<float, N>& values) const {
        if (wide) write(wide + i, values);
        if (!half) return;
        Pack<uint16_t, N> bits;
        Pack<int16_t, N> rest;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (low)
                split(values.item[j], bits.item[j], rest.item[j]);
            else
                bits.item[j] = rounded(values.item[j], uint32_t(i + j));
            if (!wide && !low) values.item[j] = widen(bits.item[j], brain);
        }
        write(half + i, bits);
        if (low) write(low + i, rest);
    }

  private:
    __device__ uint16_t rounded(float x, uint32_t i) const {
        if (!stochastic) return brain ? narrow<bfloat16>(x) : narrow<float16>(x);
        const uint32_t random = random_bits(key, begin + i);
        return brain ? round_to_bfloat16(x, random) : narrow<float16>(round_to_float16(x, random));
    }
};

// Whether parameter, master and states of a row all allow vectors; fixed as long as the table stands, so that sums over
// the parameter are taken in the same order by every pass.
__device__ inline bool vectors(const Chunk& chunk) {
    const int64_t* row = chunk.row;
    const int64_t storage = chunk.storage();
    int64_t states = 0;
#pragma unroll
    for (int k = 0; k < kMaxStates; ++k) states |= row[kState + k];
    const int64_t wide = states | (storage == kFloat32 ? row[kParam] : has_master(storage) ? row[kMaster] : 0);
    const int64_t half = storage == kFloat32 ? 0 : row[kParam] | (storage == kBFloat16Remainder ? row[kMaster] : 0);
    return wide % (kWidth * 4) == 0 && half % (kWidth * 2) == 0;
}

}  // namespace pybatch::PB_ISA
