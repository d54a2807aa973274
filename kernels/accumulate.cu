// Adds a micro-batch's gradients to their sums and takes the norms of both, in one read of each.

#include "chunk.cuh"

namespace pybatch::PB_ISA {
namespace {

constexpr int kStages = 4;  // packs whose loads are all under way before the first is stored: a store holds back loads

template <class G>
struct Adding {
    const G* gradient;
    float* sum;
    float weight;
    bool fresh, vectors;
    Squares small, large;

    // Packs of N elements at i, i + stride, ...: all loads, then the arithmetic and stores of each.
    template <int N, int stages>
    __device__ void packs(int i, int stride) {
        Pack<G, N> gradients[stages];
        Pack<float, N> totals[stages] = {};
#pragma unroll
        for (int k = 0; k < stages; ++k) {
            gradients[k] = fetch<N>(gradient + i + k * stride, vectors);
            if (!fresh) totals[k] = fetch<N>(sum + i + k * stride, true);
        }
#pragma unroll
        for (int k = 0; k < stages; ++k) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float x = load(gradients[k].item[j]);
                float& total = totals[k].item[j];
                total = fresh ? weight * x : fmaf(weight, x, total);
                small.add(x);
                large.add(total);
            }
            write(sum + i + k * stride, totals[k]);
        }
    }

    __device__ void all(int size) {
        constexpr int stride = kWidth * kThreads;
        const int whole = aligned(sum) ? size - size % kWidth : 0;
        int i = kWidth * threadIdx.x;
        for (; i + (kStages - 1) * stride < whole; i += kStages * stride) packs<kWidth, kStages>(i, stride);
        for (; i < whole; i += stride) packs<kWidth, 1>(i, stride);
        for (i = whole + threadIdx.x; i < size; i += kThreads) packs<1, 1>(i, kThreads);
    }
};

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
                    const auto* gradient = chunk.at<const decltype(type)>(kGrad);
                    Adding<decltype(type)> adding{gradient,          sum, weight, chunk.row[kFresh] != 0,
                                                  aligned(gradient), {},  {}};
                    adding.all(chunk.size);
                    small = adding.small;
                    large = adding.large;
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
