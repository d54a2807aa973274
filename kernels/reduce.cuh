// Sums that come out the same every time: fp32 per thread, a tree of fixed order per block, float64 across blocks in
// the order of the chunks. No floating-point atomics; an integer ticket finds the block that finishes last.
#pragma once

#include "rule.h"
#include "table.h"

namespace pybatch::PB_ISA {

constexpr int kThreads = 256;
constexpr int kResident = 3;  // blocks per multiprocessor: 85 registers a thread, so no rule spills

struct Pair {
    double small, large;
};

// Adds both numbers over the block; the result is valid in thread 0. Every thread must call it.
__device__ inline Pair block_sum(double small, double large) {
    __shared__ Pair warps[kThreads / 32];
    for (int offset = 16; offset > 0; offset /= 2) {
        small += __shfl_down_sync(0xffffffffu, small, offset);
        large += __shfl_down_sync(0xffffffffu, large, offset);
    }
    __syncthreads();  // an earlier call may still be reading
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {small, large};
    __syncthreads();
    Pair total{0.0, 0.0};
    if (threadIdx.x == 0)
        for (const Pair& warp : warps) {
            total.small += warp.small;
            total.large += warp.large;
        }
    return total;
}

// True in every thread of the block that comes here last, after all writes of the others are visible; resets the
// ticket.
__device__ inline bool is_last_block(unsigned* ticket) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Sum of all partials, in the order of the chunks within each thread and of the threads within the block.
__device__ inline Pair sum_partials(const Table& t) {
    double small = 0.0, large = 0.0;
    for (int64_t i = threadIdx.x; i < t.chunk_count; i += kThreads) {
        small += __ldcg(t.partials + 2 * i);  // written by other blocks of this launch: not from the L1 cache
        large += __ldcg(t.partials + 2 * i + 1);
    }
    return block_sum(small, large);
}

}  // namespace pybatch::PB_ISA
