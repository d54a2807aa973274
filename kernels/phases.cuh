// What the prepare and update phases share, whatever their states are kept in: a rule made once per block, which chunk
// a block works on, and the bookkeeping of the block that finishes last.
#pragma once

#include "ledger.h"
#include "memory.cuh"

namespace pybatch::PB_ISA {

// The scalars of a tensor's rule take double powers: once per block, not per thread.
template <class Rule>
__device__ __forceinline__ Rule make_rule(const Table& t, const Chunk& chunk, double param_sq, double other_sq) {
    __shared__ Rule rule;
    if (threadIdx.x == 0) {
        Tensor at = tensor_of(t, chunk.row, chunk.index);
        at.param_sq = param_sq;
        at.other_sq = other_sq;
        rule = Rule::make(at);
    }
    __syncthreads();
    return rule;
}

// The same with the norms that the passes before have left; scale: from the stored gradient to what the rule sees.
template <class Rule>
__device__ __forceinline__ Rule make_rule_with_norms(const Table& t, const Chunk& chunk, double scale) {
    const double* norms = t.norms + chunk.index * kRowNorms;
    const double unit = Rule::norms == Norms::gradient ? scale * scale : 1.0;
    return make_rule<Rule>(t, chunk, norms[kParamSq], unit * norms[kDirectionSq]);
}

// From the stored gradient to what the rule sees.
__device__ inline float gradient_factor(const Table& t, const Chunk& chunk, double scale) {
    return float(t.hyper[chunk.row[kGroup] * kHyperColumns + kMaximize] != 0.0 ? -scale : scale);
}

// Of a chunk whose parameter or states are rounded stochastically in the step at hand.
__device__ inline uint32_t chunk_key(const Table& t, const Call& call, const Chunk& chunk) {
    const bool random = is_stochastic(chunk.storage()) || t.states == kStateBFloat16;
    return random ? random_key(call.seed, chunk.row[kSalt], double(t.steps[chunk.index]) + 1.0, chunk.begin) : 0u;
}

// Calls work(rule of that number, of no use but its type). Inlined by force, as all that takes work: past a dozen rules
// the compiler would call a function, and keep table and call in local memory for it.
template <class Work>
__device__ __forceinline__ void with_rule(int64_t number, const Work& work) {
    switch (number) {
#define PB_CASE(NUMBER, RULE) \
    case NUMBER:              \
        return work(RULE{});
        PB_FOR_EACH_RULE(PB_CASE)
#undef PB_CASE
    }
}

// Calls work(rule, chunk, its number, scale) for the block's chunk where its rule has to be prepared.
template <class Work>
__device__ __forceinline__ void prepare_phase(const Table& t, const Call& call, const Work& work) {
    const Verdict verdict = judge(t.ledger, call);
    if (verdict.skip) return;
    const int source = source_of(call);
    if (int64_t(blockIdx.x) < t.chunk_count) {
        const int64_t number = t.chunk_count - 1 - blockIdx.x;  // backwards: the gradients read last are in the cache
        const Chunk chunk(t, number);
        if (chunk.row[source])
            with_rule(chunk.rule(), [&](auto type) {
                using Rule = decltype(type);
                if constexpr (Rule::norms == Norms::direction)
                    work(type, chunk, number, verdict.unscaled * verdict.clip);
            });
    }
    if (!is_last_block(t.ticket)) return;
    for_each_row(t, [&](int64_t row, const Pair& sums) {
        const int64_t* columns = t.rows + row * kColumns;
        if (!columns[source] || norms_of(columns[kCode] / kStorages) != Norms::direction) return;
        t.norms[row * kRowNorms + kParamSq] = t.share[row] * sums.first;
        t.norms[row * kRowNorms + kDirectionSq] = t.share[row] * sums.second;
    });
}

// Leaves the chunk's gradient divided by the scale: after the rule has read it, so that it comes from the cache.
__device__ __forceinline__ void unscale(const Chunk& chunk, float scale) {
    __syncthreads();  // threads share the elements out otherwise than the rule's loop does
    with_type(chunk.row[kGradType], [&](auto type) {
        using T = decltype(type);
        constexpr int N = kVector / sizeof(T);
        T* data = chunk.at<T>(kGrad);
        for_each<N>(chunk.size, aligned<N>(data), [&](auto width, int i) {
            auto pack = fetch<decltype(width)::value>(data + i, true);
#pragma unroll
            for (T& item : pack.item) store(item, quotient(load(item), scale));
            write(data + i, pack);
        });
    });
}

// Calls work(rule, chunk, its number, scale) for the block's chunk.
template <class Work>
__device__ __forceinline__ void update_phase(const Table& t, const Call& call, const Work& work) {
    __shared__ Verdict verdict;
    const int source = source_of(call);
    if (threadIdx.x == 0) verdict = judge(t.ledger, call);
    __syncthreads();
    if (int64_t(blockIdx.x) < t.chunk_count && !verdict.skip) {
        // Against the order of the pass before: the gradients it read last are still in the cache.
        const int64_t number = call.prepare ? int64_t(blockIdx.x) : t.chunk_count - 1 - blockIdx.x;
        const Chunk chunk(t, number);
        if (chunk.row[source]) {
            with_rule(chunk.rule(), [&](auto type) { work(type, chunk, number, verdict.unscaled * verdict.clip); });
            if (call.unscale) unscale(chunk, *call.grad_scale);
        }
    }
    if (!is_last_block(t.ticket)) return;  // every block has read its step and the ledger by now
    if (call.row_norms && !verdict.skip)
        for_each_row(t, [&](int64_t row, const Pair& sums) {
            const int64_t* columns = t.rows + row * kColumns;
            if (columns[source] && carries(columns)) t.carried[row] = sums.first;
        });
    const RingPlace place = ring_place(t.ledger);
    for (int64_t row = threadIdx.x; row < t.row_count; row += kThreads) {
        const int64_t* columns = t.rows + row * kColumns;
        const bool taken = columns[source] != 0;
        if (taken && !verdict.skip) advance(t, columns, row);
        if (t.layers && !call.follow) settle_layer(t.layers + row * kLayerSize, taken, place, call, verdict);
    }
    __syncthreads();  // every thread has read the ledger
    if (threadIdx.x == 0) settle(t.ledger, t.ring, call, verdict);
}

}  // namespace pybatch::PB_ISA
