// The CUDA part as C++ for the host, behind a C interface; tests/kernels/test_cuda_on_host.py builds it.

#include <cuda_runtime.h>  // the one beside this file

#include "table.h"

namespace pybatch {

using HostKernel = void (*)(Table, Call);

}  // namespace pybatch

// Every kernel has the same two arguments.
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, int, void*) {
    const auto run = reinterpret_cast<pybatch::HostKernel>(const_cast<void*>(kernel));
    const auto& table = *static_cast<const pybatch::Table*>(arguments[0]);
    const auto& call = *static_cast<const pybatch::Call*>(arguments[1]);
    ++host_cuda::launches;
    return host_cuda::launch(blocks.x, threads.x, [&] { run(table, call); });
}

#define PB_CUDA
#include "accumulate.cu"
#include "narrow.cu"
#include "step.cu"
#include "step_cuda.cpp"

using pybatch::Call;
using pybatch::Table;

#define PB_EXPORT(NAME)                                                                                     \
    extern "C" __attribute__((visibility("default"))) int host_##NAME(const Table* table, const Call* call, \
                                                                      bool backwards, unsigned* launches) { \
        host_cuda::backwards = backwards;                                                                   \
        host_cuda::launches = 0;                                                                            \
        const int error = pybatch::cuda_##NAME(*table, *call, nullptr);                                     \
        *launches = host_cuda::launches;                                                                    \
        return error;                                                                                       \
    }
PB_EXPORT(norm)
PB_EXPORT(prepare)
PB_EXPORT(update)
PB_EXPORT(step)
PB_EXPORT(accumulate)
