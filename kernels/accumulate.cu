// Adds a micro-batch's gradients to their sums and takes the norms of both, in one read of each.

#include "chunk.cuh"

namespace pybatch::PB_ISA {
namespace {

template <class G>
__device__ void add(const G* g, float* sum, float weight, bool fresh, int size, Squares& small, Squares& large) {
    const bool grad_vectors = aligned(g);
    for_each(size, aligned(sum), [&](auto width, int i) {
        constexpr int N = decltype(width)::value;
        const Pack<G, N> gradient = fetch<N>(g + i, grad_vectors);
        Pack<float, N> total{};
        if (!fresh) total = fetch<N>(sum + i, true);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float x = load(gradient.item[j]);
            total.item[j] = fresh ? weight * x : fmaf(weight, x, total.item[j]);
            small.add(x);
            large.add(total.item[j]);
        }
        write(sum + i, total);
    });
}

__global__ void __launch_bounds__(kThreads, kResident) accumulate_kernel(const Table t, const Call call) {
    if (int64_t(blockIdx.x) < t.chunk_count) {
        const Chunk chunk(t, blockIdx.x);
        Squares small, large;
        if (chunk.row[kSum]) {
            float* sum = chunk.at<float>(kSum);
            const float weight = float(call.weight);
            if (!chunk.row[kGrad]) {  // this micro-batch did not touch the tensor
                large = squares<float>(sum, chunk.size);
            } else if (chunk.row[kGrad] == chunk.row[kSum] && weight == 1.0f) {  // the gradient is the sum
                small = large = squares<float>(sum, chunk.size);
            } else {
                with_type(chunk.row[kGradType], [&](auto type) {
                    add(chunk.at<const decltype(type)>(kGrad), sum, weight, chunk.row[kFresh] != 0, chunk.size, small,
                        large);
                });
            }
        }
        store_partial(t, blockIdx.x, small, large);
    }
    if (!is_last_block(t.ticket)) return;
    const Pair total = sum_chunks(t);
    if (threadIdx.x == 0) {
        t.ledger[kSumSq] = total.second;
        t.ledger[kMicroSq] += call.examples * total.first;
        if (!isfinite(total.first) || !isfinite(total.second)) t.ledger[kBad] = 1.0;
    }
    for_each_row(t, [&](int64_t row, const Pair& sums) {
        const double large = t.share[row] * sums.second;
        t.norms[row * kRowNorms + kDirectionSq] = large;
        if (!t.layers) return;
        double* layer = t.layers + row * kLayerSize;
        layer[kLayerMicroSq] += call.examples * t.share[row] * sums.first;
        layer[kLayerSumSq] = large;
    });
}

}  // namespace

cudaError_t launch_accumulate(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(accumulate_kernel, table, call, stream);
}

}  // namespace pybatch::PB_ISA
