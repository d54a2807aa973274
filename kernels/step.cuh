// What the CUDA passes share: finding a block's chunk, vector access, squares that remember a non-finite element.
#pragma once

#include <cuda_runtime.h>

#include "ledger.h"
#include "number.h"
#include "reduce.cuh"
#include "rules.h"

namespace pybatch::PB_ISA {

constexpr int kWidth = 4;  // elements per vector access: 16 bytes of fp32

struct Chunk {
    const int64_t* row;
    int64_t index, begin;
    int size;

    __device__ Chunk(const Table& t, int64_t i)
        : row(t.rows + t.chunks[2 * i] * kColumns), index(t.chunks[2 * i]), begin(t.chunks[2 * i + 1] * t.chunk) {
        const int64_t left = row[kNumel] - begin;
        size = int(left < t.chunk ? left : t.chunk);
    }

    template <class T>
    __device__ T* at(int column) const {
        return reinterpret_cast<T*>(row[column]) + begin;
    }
};

template <class T>
struct alignas(sizeof(T) * kWidth) Pack {
    T item[kWidth];
};

template <class T>
__device__ inline bool aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T>) == 0;
}

// Calls work(i, width) for every element of the chunk, whole vectors first where `vectors`, then one by one.
template <class Vector, class Scalar>
__device__ inline void for_each(int size, bool vectors, const Vector& vector, const Scalar& scalar) {
    const int whole = vectors ? size / kWidth : 0;
    for (int i = threadIdx.x; i < whole; i += kThreads) vector(i);
    for (int i = whole * kWidth + threadIdx.x; i < size; i += kThreads) scalar(i);
}

// Sum of squares in fp32. A finite sum may overflow, so the verdict comes from x * 0, which is NaN only for NaN and
// inf.
struct Squares {
    float sum = 0.0f, bad = 0.0f;

    __device__ void add(float x) {
        sum = fmaf(x, x, sum);
        bad = fmaf(x, 0.0f, bad);
    }
    __device__ double value() const { return double(sum) + double(bad); }  // NaN where an element was not finite
};

template <class T>
__device__ inline Squares squares(const T* data, int size) {
    Squares total;
    for_each(
        size, aligned(data),
        [&](int i) {
            const Pack<T> pack = reinterpret_cast<const Pack<T>*>(data)[i];
            for (const T& item : pack.item) total.add(load(item));
        },
        [&](int i) { total.add(load(data[i])); });
    return total;
}

// Calls work(element type) for the row's dtype; uniform over the block.
template <class Work>
__device__ inline void with_dtype(int dtype, const Work& work) {
    switch (dtype) {
        case kFloat32:
            return work(float());
        case kBFloat16:
            return work(bfloat16());
        case kFloat16:
            return work(float16());
    }
}

inline unsigned blocks(const Table& t) { return t.chunk_count > 0 ? unsigned(t.chunk_count) : 1u; }

cudaError_t launch_norm(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_update(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_accumulate(const Table& table, const Call& call, cudaStream_t stream);

}  // namespace pybatch::PB_ISA
