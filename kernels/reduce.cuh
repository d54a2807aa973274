// Sums that come out the same every time: fp32 per thread, a tree of fixed order per block, float64 across blocks in
// the order of the chunks. No floating-point atomics; an integer ticket finds the block that finishes last.
#pragma once

#include "rule.h"
#include "table.h"

namespace pybatch::PB_ISA {

constexpr int kThreads = 256;
// Blocks per multiprocessor: 80 registers a thread. Of the rules only AMSGrad's spill then, 16 bytes, on 16-bit
// parameters; without the bound the update takes 127 registers, and a third of the threads have no place.
constexpr int kResident = 3;
constexpr unsigned kWarp = 0xffffffffu;

// The two sums of a chunk; Table.partials holds them.
struct Pair {
    double first, second;

    __device__ void add(const Pair& other) {
        first += other.first;
        second += other.second;
    }
};

// Written by other blocks of this launch: not from the L1 cache.
__device__ inline Pair load_partial(const Table& t, int64_t chunk) {
    return {__ldcg(t.partials + 2 * chunk), __ldcg(t.partials + 2 * chunk + 1)};
}

// Adds over the warp; valid in every lane. Every lane must call it.
__device__ inline Pair warp_sum(Pair sum) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const Pair other{__shfl_xor_sync(kWarp, sum.first, offset), __shfl_xor_sync(kWarp, sum.second, offset)};
        sum.add(other);
    }
    return sum;
}

// Adds over the block; valid in thread 0. Every thread must call it.
__device__ inline Pair block_sum(Pair sum) {
    __shared__ Pair warps[kThreads / 32];
    sum = warp_sum(sum);
    __syncthreads();  // an earlier call may still be reading
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    Pair total{0.0, 0.0};
    if (threadIdx.x == 0)
        for (const Pair& warp : warps) total.add(warp);
    return total;
}

// True in every thread of the block that comes here last, after all writes of the others are visible. Fences are
// cumulative: one thread's between two barriers serves its block. The ticket wraps to 0 for the next launch.
__device__ inline bool is_last_block(unsigned* ticket) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Sum over all chunks, each by its tensor's share, in the order of the chunks within each thread and of the threads
// within the block; valid in thread 0.
__device__ inline Pair sum_chunks(const Table& t) {
    Pair sum{0.0, 0.0};
    for (int64_t i = threadIdx.x; i < t.chunk_count; i += kThreads) {
        const double share = t.share[t.chunks[2 * i]];
        const Pair chunk = load_partial(t, i);
        sum.add({share * chunk.first, share * chunk.second});
    }
    return block_sum(sum);
}

// Calls use(row, sums of the row's chunks) once per row, by one thread of the block. Every thread must call it.
template <class Use>
__device__ inline void for_each_row(const Table& t, const Use& use) {
    constexpr int64_t kFew = 16;  // chunks one lane adds by itself; more are spread over its warp
    const int lane = threadIdx.x % 32;
    for (int64_t first = threadIdx.x - lane; first < t.row_count; first += kThreads) {
        const int64_t row = first + lane;
        const bool there = row < t.row_count;
        const int64_t begin = there ? t.starts[row] : 0, end = there ? t.starts[row + 1] : 0;
        const bool few = end - begin <= kFew;
        Pair sums{0.0, 0.0};
        for (int64_t i = begin; few && i < end; ++i) sums.add(load_partial(t, i));
        for (unsigned rest = __ballot_sync(kWarp, !few); rest; rest &= rest - 1) {
            const int owner = __ffs(int(rest)) - 1;
            const int64_t start = __shfl_sync(kWarp, begin, owner), stop = __shfl_sync(kWarp, end, owner);
            Pair part{0.0, 0.0};
            for (int64_t i = start + lane; i < stop; i += 32) part.add(load_partial(t, i));
            part = warp_sum(part);
            if (lane == owner) sums = part;
        }
        if (there) use(row, sums);
    }
}

}  // namespace pybatch::PB_ISA
