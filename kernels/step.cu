// The update over a list of tensors: the norm of the gradients, then load -> rule -> store. One launch each, any model.

#include "step.cuh"

namespace pybatch::PB_ISA {
namespace {

__global__ void __launch_bounds__(kThreads, kResident) norm_kernel(const Table t, const Call call) {
    double value = 0.0;
    const int source = call.sum ? kSum : kGrad;
    if (int64_t(blockIdx.x) < t.chunk_count) {
        const Chunk chunk(t, blockIdx.x);
        if (chunk.row[source]) {
            if (call.sum)
                value = squares(chunk.at<const float>(kSum), chunk.size).value();
            else
                with_dtype(int(chunk.row[kCode] % kDtypes), [&](auto type) {
                    value = squares(chunk.at<const decltype(type)>(kGrad), chunk.size).value();
                });
        }
        const Pair sum = block_sum(0.0, value);
        if (threadIdx.x == 0) {
            t.partials[2 * blockIdx.x] = 0.0;
            t.partials[2 * blockIdx.x + 1] = sum.large;
        }
    }
    if (!is_last_block(t.ticket)) return;
    const Pair total = sum_partials(t);
    if (threadIdx.x == 0) {
        t.ledger[kSumSq] = total.large;
        t.ledger[kBad] = isnan(total.large) ? 1.0 : 0.0;
    }
}

template <class Rule, class P, class G>
__device__ void update(const Rule& shared_rule, const Chunk& chunk, const G* g, float scale) {
    const Rule rule = shared_rule;
    P* p = chunk.at<P>(kParam);
    float* states[kMaxStates];
    bool vectors = aligned(p) && aligned(g);
    for (int k = 0; k < Rule::states; ++k) {
        states[k] = chunk.at<float>(kState0 + k);
        vectors = vectors && aligned(states[k]);
    }
    for_each(
        chunk.size, vectors,
        [&](int i) {
            Pack<P> value = reinterpret_cast<const Pack<P>*>(p)[i];
            const Pack<G> gradient = reinterpret_cast<const Pack<G>*>(g)[i];
            Pack<float> state[kMaxStates];
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) state[k] = reinterpret_cast<const Pack<float>*>(states[k])[i];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                float s[kMaxStates], x = load(value.item[j]);
#pragma unroll
                for (int k = 0; k < Rule::states; ++k) s[k] = state[k].item[j];
                rule.update(x, load(gradient.item[j]) * scale, s);
                store(value.item[j], x);
#pragma unroll
                for (int k = 0; k < Rule::states; ++k) state[k].item[j] = s[k];
            }
            reinterpret_cast<Pack<P>*>(p)[i] = value;
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) reinterpret_cast<Pack<float>*>(states[k])[i] = state[k];
        },
        [&](int i) {
            float s[kMaxStates], x = load(p[i]);
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) s[k] = states[k][i];
            rule.update(x, load(g[i]) * scale, s);
            store(p[i], x);
#pragma unroll
            for (int k = 0; k < Rule::states; ++k) states[k][i] = s[k];
        });
}

template <class Rule, class P>
__device__ void update_row(const Table& t, const Call& call, const Chunk& chunk, double scale) {
    __shared__ Rule rule;  // its scalars take double powers: once per block, not per thread
    const double* hyper = t.hyper + chunk.row[kGroup] * kHyperColumns;
    if (threadIdx.x == 0) rule = Rule::make(hyper, double(t.steps[chunk.index]) + 1.0);
    __syncthreads();
    const float factor = float(hyper[kMaximize] != 0.0 ? -scale : scale);
    if (call.sum)
        update<Rule, P, float>(rule, chunk, chunk.at<const float>(kSum), factor);
    else
        update<Rule, P, P>(rule, chunk, chunk.at<const P>(kGrad), factor);
}

__global__ void __launch_bounds__(kThreads, kResident) update_kernel(const Table t, const Call call) {
    __shared__ Verdict verdict;
    const int source = call.sum ? kSum : kGrad;
    if (threadIdx.x == 0) verdict = judge(t.ledger, call);
    __syncthreads();
    if (int64_t(blockIdx.x) < t.chunk_count && !verdict.skip) {
        // Backwards: the gradients the norm read last are still in the cache.
        const Chunk chunk(t, t.chunk_count - 1 - blockIdx.x);
        if (chunk.row[source]) {
            const double scale = verdict.unscaled * verdict.clip;
            with_dtype(int(chunk.row[kCode] % kDtypes), [&](auto type) {
                using P = decltype(type);
                switch (chunk.row[kCode] / kDtypes) {
#define PB_CASE(NUMBER, RULE)                       \
    case NUMBER:                                    \
        update_row<RULE, P>(t, call, chunk, scale); \
        break;
                    PB_FOR_EACH_RULE(PB_CASE)
#undef PB_CASE
                }
            });
        }
    }
    if (!is_last_block(t.ticket)) return;  // every block has read its step and the ledger by now
    if (!verdict.skip)
        for (int64_t row = threadIdx.x; row < t.row_count; row += kThreads)
            if (t.rows[row * kColumns + source]) t.steps[row] += 1.0f;
    if (threadIdx.x == 0) settle(t.ledger, t.ring, call, verdict);
}

}  // namespace

cudaError_t launch_norm(const Table& table, const Call& call, cudaStream_t stream) {
    norm_kernel<<<blocks(table), kThreads, 0, stream>>>(table, call);
    return cudaGetLastError();
}

cudaError_t launch_update(const Table& table, const Call& call, cudaStream_t stream) {
    update_kernel<<<blocks(table), kThreads, 0, stream>>>(table, call);
    return cudaGetLastError();
}

}  // namespace pybatch::PB_ISA
