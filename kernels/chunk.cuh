// What the CUDA passes share: finding a block's chunk, vector access, sums of squares.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "number.h"
#include "reduce.cuh"
#include "rules.h"

namespace pybatch::PB_ISA {

constexpr int kVector = 16;          // bytes of the widest access
constexpr int kWidth = kVector / 4;  // elements per access where fp32 is among them

struct Chunk {
    const int64_t* row;
    int64_t index, begin;
    int size;

    __device__ Chunk(const Table& t, int64_t i)
        : row(t.rows + t.chunks[2 * i] * kColumns), index(t.chunks[2 * i]), begin(t.chunks[2 * i + 1] * t.chunk) {
        const int64_t left = row[kNumel] - begin;
        size = int(left < t.chunk ? left : t.chunk);
    }

    __device__ int64_t rule() const { return row[kCode] / kStorages; }
    __device__ int64_t storage() const { return row[kCode] % kStorages; }

    template <class T>
    __device__ T* at(int column) const {
        return reinterpret_cast<T*>(row[column]) + begin;
    }
};

// The column of the gradient a step takes.
__device__ inline int source_of(const Call& call) { return call.sum ? kSum : kGrad; }

// Whether a row's |p|^2 is carried from one update to the next.
__device__ inline bool carries(const int64_t* row) { return norms_of(row[kCode] / kStorages) == Norms::gradient; }

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T item[N];
};

template <int N = kWidth, class T>
__device__ inline bool aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (N * sizeof(T)) == 0;
}

template <int N, class T>
__device__ inline Pack<std::remove_const_t<T>, N> fetch(T* from, bool vector) {
    Pack<std::remove_const_t<T>, N> pack;
    if (N == 1 || vector)
        pack = *reinterpret_cast<const Pack<std::remove_const_t<T>, N>*>(from);
    else
#pragma unroll
        for (int j = 0; j < N; ++j) pack.item[j] = from[j];
    return pack;
}

template <class T, int N>
__device__ inline void write(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <int N>
using Width = std::integral_constant<int, N>;

// Calls work(width, i) for elements i to i + width: whole vectors of N first where `vectors`, then one by one.
template <int N = kWidth, class Work>
__device__ __forceinline__ void for_each(int size, bool vectors, const Work& work) {
    const int whole = vectors ? size - size % N : 0;
    for (int i = N * threadIdx.x; i < whole; i += N * kThreads) work(Width<N>(), i);
    for (int i = whole + threadIdx.x; i < size; i += kThreads) work(Width<1>(), i);
}

// Sum of squares in fp32, of any fp32 elements: squares of large and of small ones leave its range, so that they are
// summed scaled as well (Blue 1978). Squares of the largest scaled by 2^-80 are below 2^96: that sum is infinite or NaN
// where an element is, and nowhere else.
struct Squares {
    float middle = 0.0f, large = 0.0f, small = 0.0f;

    __device__ void add(float x) {
        const float down = x * 0x1p-80f, up = x * 0x1p100f;
        middle = fmaf(x, x, middle);
        large = fmaf(down, down, large);
        small = fmaf(up, up, small);
    }
    __device__ double value() const {
        if (!isfinite(large)) return double(large);
        if (!(middle < 0x1p120f)) return double(large) * 0x1p160;
        return middle < 0x1p-90f ? double(small) * 0x1p-200 : double(middle);
    }
};

template <class T>
__device__ inline Squares squares(const T* data, int size) {
    constexpr int N = kVector / sizeof(T);
    Squares total;
    for_each<N>(size, aligned<N>(data), [&](auto width, int i) {
        const auto pack = fetch<decltype(width)::value>(data + i, true);
        for (const T& item : pack.item) total.add(load(item));
    });
    return total;
}

// Calls work(a value of the element type) for a gradient's dtype; the same for the whole block.
template <class Work>
__device__ __forceinline__ void with_type(int64_t type, const Work& work) {
    switch (type) {
        case kGradFloat32:
            return work(float());
        case kGradBFloat16:
            return work(bfloat16());
        case kGradFloat16:
            return work(float16());
    }
}

// By every thread of the block, once per chunk.
__device__ inline void store_partial(const Table& t, int64_t chunk, const Squares& first, const Squares& second) {
    const Pair sum = block_sum({first.value(), second.value()});
    if (threadIdx.x != 0) return;
    t.partials[2 * chunk] = sum.first;
    t.partials[2 * chunk + 1] = sum.second;
}

using Kernel = void (*)(Table, Call);

// One block a chunk, and at least one, which keeps the books.
inline cudaError_t launch(Kernel kernel, const Table& table, const Call& call, cudaStream_t stream) {
    const unsigned blocks = table.chunk_count > 0 ? unsigned(table.chunk_count) : 1u;
    void* arguments[] = {const_cast<Table*>(&table), const_cast<Call*>(&call)};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads), arguments, 0, stream);
}

}  // namespace pybatch::PB_ISA
