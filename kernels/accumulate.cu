// Adds a micro-batch's gradients to their sums and takes the norms of both, in one read of each.

#include "step.cuh"

namespace pybatch::PB_ISA {
namespace {

template <class G>
__device__ void add(const G* g, float* sum, float weight, bool fresh, int size, Squares& small, Squares& large) {
    const auto one = [&](float x, float old) {
        const float s = fresh ? weight * x : fmaf(weight, x, old);
        small.add(x);
        large.add(s);
        return s;
    };
    for_each(
        size, aligned(g) && aligned(sum),
        [&](int i) {
            const Pack<G> gradient = reinterpret_cast<const Pack<G>*>(g)[i];
            Pack<float> total{};
            if (!fresh) total = reinterpret_cast<const Pack<float>*>(sum)[i];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) total.item[j] = one(load(gradient.item[j]), total.item[j]);
            reinterpret_cast<Pack<float>*>(sum)[i] = total;
        },
        [&](int i) { sum[i] = one(load(g[i]), fresh ? 0.0f : sum[i]); });
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
                with_dtype(int(chunk.row[kCode] % kDtypes), [&](auto type) {
                    add(chunk.at<const decltype(type)>(kGrad), sum, weight, chunk.row[kFresh] != 0, chunk.size, small,
                        large);
                });
            }
        }
        const Pair pair = block_sum(small.value(), large.value());
        if (threadIdx.x == 0) {
            t.partials[2 * blockIdx.x] = pair.small;
            t.partials[2 * blockIdx.x + 1] = pair.large;
        }
    }
    if (!is_last_block(t.ticket)) return;
    const Pair total = sum_partials(t);
    if (threadIdx.x == 0) {
        t.ledger[kSumSq] = total.large;
        t.ledger[kMicroSq] += call.examples * total.small;
        if (isnan(total.small) || isnan(total.large)) t.ledger[kBad] = 1.0;
    }
}

}  // namespace

cudaError_t launch_accumulate(const Table& table, const Call& call, cudaStream_t stream) {
    accumulate_kernel<<<blocks(table), kThreads, 0, stream>>>(table, call);
    return cudaGetLastError();
}

}  // namespace pybatch::PB_ISA
