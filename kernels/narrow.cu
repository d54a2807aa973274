// The prepare and update phases over states in 16 or 8 bits. A warp takes a block of elements that share a scale, so
// that their largest size is known without leaving it; one element an access, which misaligned tensors allow too.

#include "narrow.h"
#include "phases.cuh"

namespace pybatch::PB_ISA {
namespace {

constexpr int kPerLane = kStateBlock / 32;
constexpr int kNarrowResident = 2;  // blocks per multiprocessor: eight elements a thread need 128 registers

template <class Rule>
struct NarrowStates {
    const void* state[kRoom<Rule>];
    float* scales[kRoom<Rule>];
    bool codes;
    uint32_t key, begin;

    __device__ NarrowStates(const Table& t, const Chunk& chunk, uint32_t random)
        : codes(t.states == kState8Bit), key(random), begin(uint32_t(chunk.begin)) {
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) {
            state[k] = codes ? static_cast<const void*>(chunk.at<uint8_t>(kState + k)) : chunk.at<uint16_t>(kState + k);
            scales[k] = reinterpret_cast<float*>(chunk.row[kScale + k]) + chunk.begin / kStateBlock;
        }
    }

    __device__ uint16_t fetch(int k, int i) const {
        return codes ? uint16_t(static_cast<const uint8_t*>(state[k])[i]) : static_cast<const uint16_t*>(state[k])[i];
    }
    __device__ float value(int k, uint16_t bits, float scale) const {
        return codes ? value_of(uint8_t(bits), has_sign<Rule>(k), scale) : float_of(uint32_t(bits) << 16);
    }
    __device__ float scale(int k, int first) const { return codes ? scales[k][first / kStateBlock] : 0.0f; }

    // Writes a block of state k, by its warp; s is 0 where there is no element.
    template <int N, int M>
    __device__ __forceinline__ void write(int k, int first, int size, const float (&s)[N][M]) const {
        const int lane = threadIdx.x % 32;
        float scale = 0.0f;
        if (codes) {
            uint32_t largest = 0u;
#pragma unroll
            for (int j = 0; j < N; ++j) largest = larger_bits(largest, size_bits(s[j][k]));
            for (int offset = 16; offset > 0; offset /= 2)
                largest = larger_bits(largest, __shfl_xor_sync(kWarp, largest, offset));
            scale = float_of(largest);
            __syncwarp();  // every lane has read the old scale: shuffles order no memory
            if (lane == 0) scales[k][first / kStateBlock] = scale;
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int i = first + 32 * j + lane;
            if (i >= size) continue;
            if (codes)
                static_cast<uint8_t*>(const_cast<void*>(state[k]))[i] = code_of(s[j][k], has_sign<Rule>(k), scale);
            else
                static_cast<uint16_t*>(const_cast<void*>(state[k]))[i] =
                    round_to_bfloat16(s[j][k], random_bits(state_key(key, k), begin + uint32_t(i)));
        }
    }
};

// Calls work(i, parameter, gradient that the rule sees or 0, states) for every element of the chunk, and keeps the
// states where `write`. Everything is fetched before the first is used.
template <class Rule, bool with_gradient, bool write, class Work>
__device__ __forceinline__ void for_each_element(const Chunk& chunk, const Stored& memory,
                                                 const NarrowStates<Rule>& states, float factor, const Work& work) {
    const int lane = threadIdx.x % 32;
    for (int first = int(threadIdx.x) / 32 * int(kStateBlock); first < chunk.size;
         first += kThreads / 32 * int(kStateBlock)) {
        Stored::Bits<1> bits[kPerLane];
        uint16_t raw[kPerLane][kRoom<Rule>];
        float s[kPerLane][kRoom<Rule>], scales[kRoom<Rule>];
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) scales[k] = states.scale(k, first);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
            const int i = first + 32 * j + lane;
            if (i >= chunk.size) continue;
            memory.fetch_param(bits[j], i);
            if constexpr (with_gradient) memory.fetch_grad(bits[j], i);
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) raw[j][k] = states.fetch(k, i);
        }
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
            const int i = first + 32 * j + lane;
            const bool there = i < chunk.size;
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) s[j][k] = there ? states.value(k, raw[j][k], scales[k]) : 0.0f;
            if (!there) continue;
            float g = 0.0f;
            if constexpr (with_gradient) g = memory.grad_of(bits[j], 0) * factor;
            work(i, memory.param_of(bits[j], 0), g, s[j]);
        }
        if constexpr (write) {
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) states.write(k, first, chunk.size, s);
        }
    }
}

__global__ void __launch_bounds__(kThreads, kNarrowResident) narrow_prepare_kernel(const Table t, const Call call) {
    prepare_phase(t, call, [&](auto type, const Chunk& chunk, int64_t number, double scale) {
        using Rule = decltype(type);
        const Rule rule = make_rule<Rule>(t, chunk, 0.0, 0.0);
        const uint32_t key = chunk_key(t, call, chunk);
        const Stored memory(chunk, source_of(call), key);
        const NarrowStates<Rule> states(t, chunk, key);
        Squares param, direction;
        for_each_element<Rule, true, true>(chunk, memory, states, gradient_factor(t, chunk, scale),
                                           [&](int, float p, float g, float* s) {
                                               rule.prepare(g, s);
                                               param.add(p);
                                               direction.add(rule.direction(p, s));
                                           });
        store_partial(t, number, param, direction);
    });
}

__global__ void __launch_bounds__(kThreads, kNarrowResident) narrow_update_kernel(const Table t, const Call call) {
    update_phase(t, call, [&](auto type, const Chunk& chunk, int64_t number, double scale) {
        using Rule = decltype(type);
        constexpr bool fresh = Rule::norms != Norms::direction;  // else states are final and the gradient not needed
        constexpr bool carried = Rule::norms == Norms::gradient;
        const Rule rule = make_rule_with_norms<Rule>(t, chunk, scale);
        const uint32_t key = chunk_key(t, call, chunk);
        const Stored memory(chunk, source_of(call), key);
        const NarrowStates<Rule> states(t, chunk, key);
        Squares after;
        for_each_element<Rule, fresh, fresh>(chunk, memory, states, gradient_factor(t, chunk, scale),
                                             [&](int i, float p, float g, float* s) {
                                                 Pack<float, 1> value{{p}};
                                                 rule.update(value.item[0], g, s);
                                                 memory.put(i, value);
                                                 if constexpr (carried) after.add(value.item[0]);
                                             });
        if constexpr (carried) store_partial(t, number, after, Squares());
    });
}

}  // namespace

cudaError_t launch_narrow_prepare(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(narrow_prepare_kernel, table, call, stream);
}

cudaError_t launch_narrow_update(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(narrow_update_kernel, table, call, stream);
}

}  // namespace pybatch::PB_ISA
