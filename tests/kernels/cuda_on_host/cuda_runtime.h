// The part of CUDA that the kernels use, on one thread of the host: so they are checked where there is no GPU.
//
// Blocks run one after another. The threads of a block are fibers: each runs to its next barrier or warp operation, and
// on when all have come there. So a barrier that some thread does not reach is an error, and a missing one shows as a
// result that depends on the order of the threads (host_cuda::backwards).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
    unsigned x;
    explicit dim3(unsigned count = 1) : x(count) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719;

inline dim3 threadIdx, blockIdx, gridDim;

namespace host_cuda {

constexpr unsigned kWarp = 32, kStack = 1 << 17;

enum class Stop { none, barrier, ballot, shuffle, done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Stop at = Stop::none;
    int set = 0;  // slots of its next warp operation: they alternate, so that none is overwritten before it was read
};

inline bool backwards = false;  // blocks, warps and lanes from the last to the first
inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> slots[2];  // what each thread offers to a warp operation
inline unsigned launches = 0;
inline ucontext_t scheduler;
inline void (*work)();

inline void stop(Stop at) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.at = at;
    swapcontext(&fiber.context, &scheduler);
}

// Offers a value to the warp; those of all lanes after every lane has come here.
inline const uint64_t* exchange(Stop at, uint64_t own) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.set = 1 - fiber.set;
    uint64_t* offered = slots[fiber.set].data();
    offered[threadIdx.x] = own;
    stop(at);
    return offered + threadIdx.x / kWarp * kWarp;
}

template <class T>
T shuffle(T own, unsigned lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &own, sizeof own);
    bits = exchange(Stop::shuffle, bits)[lane];
    std::memcpy(&own, &bits, sizeof own);
    return own;
}

inline void run_fiber() {
    work();
    stop(Stop::done);
}

// Runs these threads to their next stop; none where they stop at different ones.
inline Stop advance(unsigned first, unsigned count) {
    Stop at = Stop::none;
    for (unsigned i = 0; i < count; ++i) {
        threadIdx.x = first + (backwards ? count - 1 - i : i);
        Fiber& fiber = fibers[threadIdx.x];
        swapcontext(&scheduler, &fiber.context);
        if (i > 0 && fiber.at != at) return Stop::none;
        at = fiber.at;
    }
    return at;
}

inline bool run_block(unsigned threads) {
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const unsigned warps = threads / kWarp;
    for (Stop block = Stop::barrier; block == Stop::barrier;) {
        for (unsigned i = 0; i < warps; ++i) {
            Stop warp = Stop::ballot;
            while (warp == Stop::ballot || warp == Stop::shuffle)
                warp = advance((backwards ? warps - 1 - i : i) * kWarp, kWarp);
            if (warp == Stop::none || (i > 0 && warp != block)) return false;
            block = warp;
        }
        if (block == Stop::done) return true;
    }
    return false;
}

template <class Run>
cudaError_t launch(unsigned blocks, unsigned threads, const Run& run) {
    static const Run* current;
    current = &run;
    work = [] { (*current)(); };
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (auto& set : slots) set.resize(threads);
    gridDim.x = blocks;
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = backwards ? blocks - 1 - i : i;
        if (!run_block(threads)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::stop(host_cuda::Stop::barrier); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T own, int lane) {
    return host_cuda::shuffle(own, unsigned(lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T own, int mask) {
    return host_cuda::shuffle(own, threadIdx.x % host_cuda::kWarp ^ unsigned(mask));
}
inline unsigned __ballot_sync(unsigned, bool own) {
    const uint64_t* offered = host_cuda::exchange(host_cuda::Stop::ballot, own);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < host_cuda::kWarp; ++lane) bits |= unsigned(offered[lane]) << lane;
    return bits;
}
inline void __syncwarp() { host_cuda::exchange(host_cuda::Stop::ballot, 0); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldcg(const T* from) {
    return *from;
}
inline unsigned atomicInc(unsigned* to, unsigned most) {
    const unsigned before = *to;
    *to = before >= most ? 0 : before + 1;
    return before;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorLaunchFailure" : "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error ? "some threads of a block or warp did not come to the barrier of the others" : "no error";
}
