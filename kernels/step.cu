// The update over a list of tensors: norms, then load -> rule -> store. One launch a phase, any model.

#include "phases.cuh"

namespace pybatch::PB_ISA {
namespace {

__device__ Squares gradient_squares(const Chunk& chunk, bool sum) {
    if (sum) return squares(chunk.at<const float>(kSum), chunk.size);
    Squares total;
    with_type(chunk.row[kGradType],
              [&](auto type) { total = squares(chunk.at<const decltype(type)>(kGrad), chunk.size); });
    return total;
}

__device__ Squares param_squares(const Chunk& chunk) {
    const Stored memory(chunk, kGrad, 0u);
    Squares total;
    for_each(chunk.size, vectors(chunk), [&](auto width, int i) {
        constexpr int N = decltype(width)::value;
        Stored::Bits<N> bits;
        memory.fetch_param(bits, i);
#pragma unroll
        for (int j = 0; j < N; ++j) total.add(memory.param_of(bits, j));
    });
    return total;
}

__global__ void __launch_bounds__(kThreads, kResident) norm_kernel(const Table t, const Call call) {
    const int source = source_of(call);
    if (int64_t(blockIdx.x) < t.chunk_count) {
        const Chunk chunk(t, blockIdx.x);
        Squares param, gradient;
        if (chunk.row[source]) {
            if (call.norm) gradient = gradient_squares(chunk, call.sum);
            if (carries(chunk.row) && isnan(t.carried[chunk.index])) param = param_squares(chunk);
        }
        store_partial(t, blockIdx.x, param, gradient);
    }
    if (!is_last_block(t.ticket)) return;
    if (call.norm) {
        const double total = sum_chunks(t).second;
        if (threadIdx.x == 0) {
            t.ledger[kSumSq] = total;
            t.ledger[kBad] = isfinite(total) ? 0.0 : 1.0;
        }
    }
    if (!call.row_norms) return;
    for_each_row(t, [&](int64_t row, const Pair& sums) {
        double* norms = t.norms + row * kRowNorms;
        const int64_t* columns = t.rows + row * kColumns;
        if (call.norm) norms[kDirectionSq] = t.share[row] * sums.second;
        if (!carries(columns) || !columns[source]) return;
        if (isnan(t.carried[row])) t.carried[row] = sums.first;
        norms[kParamSq] = t.share[row] * t.carried[row];
    });
}

template <class Rule>
struct States {
    float* state[kRoom<Rule>];

    __device__ explicit States(const Chunk& chunk) {
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) state[k] = chunk.at<float>(kState + k);
    }
    template <int N>
    __device__ void fetch_all(Pack<float, N>* packs, int i) const {
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) packs[k] = fetch<N>(state[k] + i, true);
    }
    template <int N>
    __device__ void write_all(const Pack<float, N>* packs, int i) const {
#pragma unroll
        for (int k = 0; k < Rule::states; ++k) write(state[k] + i, packs[k]);
    }
};

// All states of element j of the packs, and back.
template <class Rule, int N>
__device__ void take(const Pack<float, N>* packs, int j, float* s) {
#pragma unroll
    for (int k = 0; k < Rule::states; ++k) s[k] = packs[k].item[j];
}
template <class Rule, int N>
__device__ void give(Pack<float, N>* packs, int j, const float* s) {
#pragma unroll
    for (int k = 0; k < Rule::states; ++k) packs[k].item[j] = s[k];
}

// Calls work(memory): Plain where everything is fp32, which is compiled for each rule without a conversion.
template <class Work>
__device__ __forceinline__ void with_memory(const Chunk& chunk, int source, uint32_t key, const Work& work) {
    if (chunk.storage() == kFloat32 && (source == kSum || chunk.row[kGradType] == kGradFloat32))
        work(Plain(chunk, source, key));
    else
        work(Stored(chunk, source, key));
}

template <class Rule>
__device__ __forceinline__ void prepare(const Table& t, const Chunk& chunk, int64_t number, int source, double scale) {
    const Rule rule = make_rule<Rule>(t, chunk, 0.0, 0.0);
    const float factor = gradient_factor(t, chunk, scale);
    const States<Rule> states(chunk);
    Squares param, direction;
    with_memory(chunk, source, 0u, [&](const auto& memory) {
        for_each(chunk.size, vectors(chunk), [&](auto width, int i) {
            constexpr int N = decltype(width)::value;
            typename std::decay_t<decltype(memory)>::template Bits<N> bits;
            Pack<float, N> packs[kRoom<Rule>];
            memory.fetch_param(bits, i);
            memory.fetch_grad(bits, i);
            states.fetch_all(packs, i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                float s[kRoom<Rule>];
                take<Rule>(packs, j, s);
                rule.prepare(memory.grad_of(bits, j) * factor, s);
                const float p = memory.param_of(bits, j);
                param.add(p);
                direction.add(rule.direction(p, s));
                give<Rule>(packs, j, s);
            }
            states.write_all(packs, i);
        });
    });
    store_partial(t, number, param, direction);
}

__global__ void __launch_bounds__(kThreads, kResident) prepare_kernel(const Table t, const Call call) {
    prepare_phase(t, call, [&](auto type, const Chunk& chunk, int64_t number, double scale) {
        prepare<decltype(type)>(t, chunk, number, source_of(call), scale);
    });
}

template <class Rule>
__device__ __forceinline__ void update(const Table& t, const Call& call, const Chunk& chunk, int64_t number,
                                       double scale) {
    constexpr bool prepared = Rule::norms == Norms::direction;  // then states are final and the gradient is not needed
    constexpr bool carried = Rule::norms == Norms::gradient;
    const Rule rule = make_rule_with_norms<Rule>(t, chunk, scale);
    const float factor = gradient_factor(t, chunk, scale);
    const uint32_t key = chunk_key(t, call, chunk);
    const States<Rule> states(chunk);
    Squares after;
    with_memory(chunk, source_of(call), key, [&](const auto& memory) {
        for_each(chunk.size, vectors(chunk), [&](auto width, int i) {
            constexpr int N = decltype(width)::value;
            typename std::decay_t<decltype(memory)>::template Bits<N> bits;
            Pack<float, N> packs[kRoom<Rule>], values;
            memory.fetch_param(bits, i);
            if constexpr (!prepared) memory.fetch_grad(bits, i);
            states.fetch_all(packs, i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                float s[kRoom<Rule>], g = 0.0f;
                take<Rule>(packs, j, s);
                if constexpr (!prepared) g = memory.grad_of(bits, j) * factor;
                values.item[j] = memory.param_of(bits, j);
                rule.update(values.item[j], g, s);
                give<Rule>(packs, j, s);
            }
            memory.put(i, values);
            if constexpr (!prepared) states.write_all(packs, i);
            if constexpr (carried)
                for (float p : values.item) after.add(p);
        });
    });
    if constexpr (carried) store_partial(t, number, after, Squares());
}

__global__ void __launch_bounds__(kThreads, kResident) update_kernel(const Table t, const Call call) {
    update_phase(t, call, [&](auto type, const Chunk& chunk, int64_t number, double scale) {
        update<decltype(type)>(t, call, chunk, number, scale);
    });
}

}  // namespace

cudaError_t launch_norm(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(norm_kernel, table, call, stream);
}

cudaError_t launch_prepare(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(prepare_kernel, table, call, stream);
}

cudaError_t launch_update(const Table& table, const Call& call, cudaStream_t stream) {
    return launch(update_kernel, table, call, stream);
}

}  // namespace pybatch::PB_ISA
