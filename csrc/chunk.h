// A chunk of a tensor, and its values as fp32 blocks: in place where memory holds fp32, else through a small buffer
// that stays in the first-level cache. So rules are compiled once, not once per storage.
#pragma once

#include "narrow.h"
#include "rules.h"
#include "storage.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace pybatch::PB_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB a buffer

struct Chunk {
    const int64_t* row;
    int64_t index, begin, size;

    Chunk(const Table& t, int64_t i)
        : row(t.rows + t.chunks[2 * i] * kColumns), index(t.chunks[2 * i]), begin(t.chunks[2 * i + 1] * t.chunk) {
        const int64_t left = row[kNumel] - begin;
        size = left < t.chunk ? left : t.chunk;
    }

    int64_t rule() const { return row[kCode] / kStorages; }
    int64_t storage() const { return row[kCode] % kStorages; }

    // Element `first` of the chunk, of the tensor whose address is in this column.
    template <class T>
    T* at(int column, int64_t first) const {
        return reinterpret_cast<T*>(row[column]) + begin + first;
    }
};

struct Buffers {
    alignas(64) float param[kBlock], grad[kBlock], direction[kBlock];
};

template <class Rule>
struct StateBuffers {
    alignas(64) float state[kRoom<Rule>][kBlock];
};

template <class T>
float* convert(const T* from, int64_t n, float* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
    return to;
}

template <class T>
void write(T* __restrict to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

#if defined(PB_FLOAT16) && defined(__F16C__)
// By hand, because GCC 12 vectorizes no conversion of _Float16. The same values: both round to nearest even.
float* convert(const float16* from, int64_t n, float* __restrict to) {
    const int64_t whole = n - n % 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (int64_t i = whole; i < n; ++i) to[i] = load(from[i]);
    return to;
}

void write(float16* __restrict to, const float* from, int64_t n) {
    const int64_t whole = n - n % 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (int64_t i = whole; i < n; ++i) store(to[i], from[i]);
}
#endif

// Elements [first, first + n) of the parameter's fp32 value; the result lies in memory or in the buffer. A pointer into
// memory is valid for the whole chunk.
float* load_param(const Chunk& chunk, int64_t first, int64_t n, float* buffer) {
    switch (chunk.storage()) {
        case kBFloat16:
        case kBFloat16Stochastic:
            return convert(chunk.at<bfloat16>(kParam, first), n, buffer);
#ifdef PB_FLOAT16
        case kFloat16:
        case kFloat16Stochastic:
            return convert(chunk.at<float16>(kParam, first), n, buffer);
#endif
        case kBFloat16Remainder: {
            const uint16_t* high = chunk.at<uint16_t>(kParam, first);
            const int16_t* low = chunk.at<int16_t>(kMaster, first);
            for (int64_t i = 0; i < n; ++i) buffer[i] = join(high[i], low[i]);
            return buffer;
        }
        case kBFloat16Master:
        case kFloat16Master:
            return chunk.at<float>(kMaster, first);
        default:
            return chunk.at<float>(kParam, first);
    }
}

// Writes back what load_param() gave; `key` is random_key() of the chunk.
void store_param(const Chunk& chunk, int64_t first, int64_t n, const float* __restrict value, uint32_t key) {
    const uint32_t index = uint32_t(chunk.begin + first);
    switch (chunk.storage()) {
        case kBFloat16:
        case kBFloat16Master:
            return write(chunk.at<bfloat16>(kParam, first), value, n);
#ifdef PB_FLOAT16
        case kFloat16:
        case kFloat16Master:
            return write(chunk.at<float16>(kParam, first), value, n);
        case kFloat16Stochastic: {
            alignas(64) float rounded[kBlock];
            for (int64_t i = 0; i < n; ++i)
                rounded[i] = round_to_float16(value[i], random_bits(key, index + uint32_t(i)));
            return write(chunk.at<float16>(kParam, first), rounded, n);
        }
#endif
        case kBFloat16Stochastic: {
            uint16_t* __restrict to = chunk.at<uint16_t>(kParam, first);
            for (int64_t i = 0; i < n; ++i) to[i] = round_to_bfloat16(value[i], random_bits(key, index + uint32_t(i)));
            return;
        }
        case kBFloat16Remainder: {
            uint16_t* __restrict high = chunk.at<uint16_t>(kParam, first);
            int16_t* __restrict low = chunk.at<int16_t>(kMaster, first);
            for (int64_t i = 0; i < n; ++i) split(value[i], high[i], low[i]);
            return;
        }
    }
}

// The same for the gradient a step takes: the fp32 sum, or kGrad in its own dtype.
const float* load_gradient(const Chunk& chunk, bool sum, int64_t first, int64_t n, float* buffer) {
    if (sum) return chunk.at<float>(kSum, first);
    switch (chunk.row[kGradType]) {
        case kGradBFloat16:
            return convert(chunk.at<bfloat16>(kGrad, first), n, buffer);
#ifdef PB_FLOAT16
        case kGradFloat16:
            return convert(chunk.at<float16>(kGrad, first), n, buffer);
#endif
        default:
            return chunk.at<float>(kGrad, first);
    }
}

// Writes back what load_gradient() gave of kGrad, where that lies in the buffer.
void store_gradient(const Chunk& chunk, int64_t first, int64_t n, const float* value) {
    if (chunk.row[kGradType] == kGradBFloat16) write(chunk.at<bfloat16>(kGrad, first), value, n);
#ifdef PB_FLOAT16
    if (chunk.row[kGradType] == kGradFloat16) write(chunk.at<float16>(kGrad, first), value, n);
#endif
}

bool gradient_in_place(const Chunk& chunk, bool sum) { return sum || chunk.row[kGradType] == kGradFloat32; }

// Elements [first, first + n) of a state as fp32, and back: in place, or by way of the buffer. `first` begins a block
// of the scales; `key` is state_key().
float* load_state(const Table& t, const Chunk& chunk, int state, bool has_sign, int64_t first, int64_t n,
                  float* buffer) {
    if (t.states == kStateFloat32) return chunk.at<float>(kState + state, first);
    if (t.states == kStateBFloat16) return convert(chunk.at<bfloat16>(kState + state, first), n, buffer);
    const uint8_t* codes = chunk.at<uint8_t>(kState + state, first);
    const float* scales = reinterpret_cast<float*>(chunk.row[kScale + state]) + (chunk.begin + first) / kStateBlock;
    for (int64_t from = 0; from < n; from += kStateBlock) {
        const int64_t end = from + kStateBlock < n ? from + kStateBlock : n;
        const float scale = scales[from / kStateBlock];
        for (int64_t i = from; i < end; ++i) buffer[i] = value_of(codes[i], has_sign, scale);
    }
    return buffer;
}

void store_state(const Table& t, const Chunk& chunk, int state, bool has_sign, int64_t first, int64_t n,
                 const float* __restrict value, uint32_t key) {
    if (t.states == kStateFloat32) return;
    if (t.states == kStateBFloat16) {
        uint16_t* __restrict to = chunk.at<uint16_t>(kState + state, first);
        const uint32_t index = uint32_t(chunk.begin + first);
        for (int64_t i = 0; i < n; ++i) to[i] = round_to_bfloat16(value[i], random_bits(key, index + uint32_t(i)));
        return;
    }
    uint8_t* __restrict codes = chunk.at<uint8_t>(kState + state, first);
    float* scales = reinterpret_cast<float*>(chunk.row[kScale + state]) + (chunk.begin + first) / kStateBlock;
    for (int64_t from = 0; from < n; from += kStateBlock) {
        const int64_t end = from + kStateBlock < n ? from + kStateBlock : n;
        uint32_t largest = 0;
        for (int64_t i = from; i < end; ++i) largest = larger_bits(largest, size_bits(value[i]));
        const float scale = scales[from / kStateBlock] = float_of(largest);
        for (int64_t i = from; i < end; ++i) codes[i] = code_of(value[i], has_sign, scale);
    }
}

// Calls work(first, n) for the blocks of a chunk: all of it at once where nothing needs a buffer.
template <class Work>
void for_blocks(const Chunk& chunk, bool in_place, const Work& work) {
    const int64_t block = in_place ? chunk.size : kBlock;
    for (int64_t first = 0; first < chunk.size; first += block)
        work(first, chunk.size - first < block ? chunk.size - first : block);
}

}  // namespace
}  // namespace pybatch::PB_ISA
