// Entry points of the CUDA part: which launches a call needs, on the caller's stream, every return code passed on.

#include <cuda_runtime.h>

#include "backend.h"
#include "rule.h"  // PB_ISA

namespace pybatch {

namespace PB_ISA {
cudaError_t launch_norm(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_prepare(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_update(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_narrow_prepare(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_narrow_update(const Table& table, const Call& call, cudaStream_t stream);
cudaError_t launch_accumulate(const Table& table, const Call& call, cudaStream_t stream);
}  // namespace PB_ISA

int cuda_norm(const Table& table, const Call& call, void* stream) {
    if (!call.norm && !(call.known && call.row_norms)) return cudaSuccess;
    return PB_ISA::launch_norm(table, call, static_cast<cudaStream_t>(stream));
}

int cuda_prepare(const Table& table, const Call& call, void* stream) {
    if (!call.prepare) return cudaSuccess;
    const auto launch = table.states == kStateFloat32 ? PB_ISA::launch_prepare : PB_ISA::launch_narrow_prepare;
    return launch(table, call, static_cast<cudaStream_t>(stream));
}

int cuda_update(const Table& table, const Call& call, void* stream) {
    const auto launch = table.states == kStateFloat32 ? PB_ISA::launch_update : PB_ISA::launch_narrow_update;
    return launch(table, call, static_cast<cudaStream_t>(stream));
}

int cuda_step(const Table& table, const Call& call, void* stream) {
    if (const int error = cuda_norm(table, call, stream)) return error;
    if (const int error = cuda_prepare(table, call, stream)) return error;
    return cuda_update(table, call, stream);
}

int cuda_accumulate(const Table& table, const Call& call, void* stream) {
    return PB_ISA::launch_accumulate(table, call, static_cast<cudaStream_t>(stream));
}

int cuda_devices() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? count : -int(error);
}

const char* cuda_error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace pybatch
