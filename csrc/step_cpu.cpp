// The passes over a list of tensors on the CPU: vectorized by the compiler, threaded over chunks.
// Compiled once per vector width, with PB_ISA naming the width.
//
// Sums are per chunk, chunks are added in their order within a tensor, and tensors in theirs: the result does not
// depend on the number of threads. A pass is called by every thread of a parallel region and ends with a barrier.

#include <cmath>
#include <utility>
#include <variant>

#include "backend.h"
#include "chunk.h"
#include "lanes.h"
#include "ledger.h"
#include "rules.h"

namespace pybatch::PB_ISA {
namespace {

constexpr int64_t kSerial = 1 << 15;  // elements; below it waking the threads takes longer than the work

bool has_gradient(const int64_t* row, const Call& call) { return row[call.sum ? kSum : kGrad] != 0; }

double row_sum(const Table& t, int64_t row, int column) {
    double sum = 0.0;
    for (int64_t i = t.starts[row]; i < t.starts[row + 1]; ++i) sum += t.partials[2 * i + column];
    return sum;
}

// Sums of squares over a chunk: of the gradient a step takes, of the parameter.
double gradient_squares(const Chunk& chunk, bool sum) {
    Buffers buffers;
    if (chunk.size <= kLanes)  // of many such tensors the lanes take longer than the squares
        return sum_of_few(load_gradient(chunk, sum, 0, chunk.size, buffers.grad), int(chunk.size));
    Lanes squares;
    for_blocks(chunk, gradient_in_place(chunk, sum),
               [&](int64_t first, int64_t n) { squares.add(load_gradient(chunk, sum, first, n, buffers.grad), n); });
    return squares.sum();
}

double param_squares(const Chunk& chunk) {
    Lanes squares;
    Buffers buffers;
    for_blocks(chunk, chunk.storage() == kFloat32,
               [&](int64_t first, int64_t n) { squares.add(load_param(chunk, first, n, buffers.param), n); });
    return squares.sum();
}

// The norm phase.

// Whether |p|^2 of the row is kept from one update to the next.
bool carries(const int64_t* row) { return norms_of(row[kCode] / kStorages) == Norms::gradient; }

void take_squares(const Table& t, const Call& call, int64_t i) {
    const Chunk chunk(t, i);
    double* squares = t.partials + 2 * i;
    squares[0] = squares[1] = 0.0;
    if (!has_gradient(chunk.row, call)) return;
    if (call.norm) squares[1] = gradient_squares(chunk, call.sum);
    if (carries(chunk.row) && std::isnan(t.carried[chunk.index])) squares[0] = param_squares(chunk);
}

void sum_norms(const Table& t, const Call& call) {
    double total = 0.0;
    for (int64_t row = 0; row < t.row_count; ++row) {
        double* norms = t.norms + row * kRowNorms;
        if (call.norm) total += norms[kDirectionSq] = t.share[row] * row_sum(t, row, 1);
        const int64_t* columns = t.rows + row * kColumns;
        if (!carries(columns) || !has_gradient(columns, call)) continue;
        if (std::isnan(t.carried[row])) t.carried[row] = row_sum(t, row, 0);
        norms[kParamSq] = t.share[row] * t.carried[row];
    }
    if (!call.norm) return;
    t.ledger[kSumSq] = total;
    t.ledger[kBad] = std::isfinite(total) ? 0.0 : 1.0;
}

void norm_pass(const Table& t, const Call& call) {
    if (!call.norm && !(call.known && call.row_norms)) return;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < t.chunk_count; ++i) take_squares(t, call, i);
#pragma omp single
    sum_norms(t, call);
}

// The prepare phase, of rules with Norms::direction.

// A loop over elements has one restricted pointer for each of its rule's states, so that it is vectorized. Not "omp
// simd": GCC then gives s one array per lane and vectorizes nothing.

template <class Rule, class... State>
void prepare_block(const Rule rule, const float* __restrict p, const float* __restrict g, float factor,
                   float* __restrict direction, int64_t n, State* __restrict... state) {
    for (int64_t i = 0; i < n; ++i) {
        float s[kRoom<Rule>] = {state[i]...};
        rule.prepare(g[i] * factor, s);
        direction[i] = rule.direction(p[i], s);
        [[maybe_unused]] const float* from = s;
        ((state[i] = *from++), ...);
    }
}

// Calls work(pointers to fp32 values of the rule's states, from element `first` on), and keeps what it has written
// there where `write`; `key` is random_key() of the chunk.
template <class Rule, class Work>
void with_states(const Table& t, const Chunk& chunk, int64_t first, int64_t n, StateBuffers<Rule>& buffers,
                 uint32_t key, bool write, const Work& work) {
    [&]<int... Number>(std::integer_sequence<int, Number...>) {
        float* const states[kRoom<Rule>] = {
            load_state(t, chunk, Number, has_sign<Rule>(Number), first, n, buffers.state[Number])...};
        work(states[Number]...);
        if (write)
            (store_state(t, chunk, Number, has_sign<Rule>(Number), first, n, states[Number], state_key(key, Number)),
             ...);
    }(std::make_integer_sequence<int, Rule::states>());
}

// The rule that a thread made last. Tensors of one group at one step have the same, and its powers and roots take as
// long as the update of a hundred elements.
template <class Rule>
struct Last {
    Tensor of{};  // nowhere: no tensor's hyper-parameters are there
    Rule rule;

    const Rule& made(const Tensor& at) {
        if (at.hyper != of.hyper || at.step != of.step || at.scalar != of.scalar || at.param_sq != of.param_sq ||
            at.other_sq != of.other_sq) {
            of = at;
            rule = Rule::make(at);
        }
        return rule;
    }
};

// One of each kind; for the time of one pass, as hyper-parameters change where they lie.
#define PB_BASE(NUMBER, RULE) Last<RULE>,
struct LastRules : PB_FOR_EACH_RULE(PB_BASE) std::monostate {};
#undef PB_BASE

// Of a chunk whose parameter or states are rounded stochastically in the step at hand.
uint32_t chunk_key(const Table& t, const Call& call, const Chunk& chunk, const Tensor& at) {
    const bool random = is_stochastic(chunk.storage()) || t.states == kStateBFloat16;
    return random ? random_key(call.seed, chunk.row[kSalt], at.step, chunk.begin) : 0u;
}

// From the stored gradient to what the rule sees.
float gradient_factor(const Tensor& at, double scale) { return float(at.hyper[kMaximize] != 0.0 ? -scale : scale); }

template <class Rule>
void prepare_rule(const Table& t, const Call& call, const Chunk& chunk, double scale, double* squares,
                  Last<Rule>& last) {
    if constexpr (Rule::norms == Norms::direction) {
        const Tensor at = tensor_of(t, chunk.row, chunk.index);
        const Rule rule = last.made(at);
        const float factor = gradient_factor(at, scale);
        const uint32_t key = chunk_key(t, call, chunk, at);
        Lanes param, direction;
        Buffers buffers;
        StateBuffers<Rule> kept;
        for_blocks(chunk, false, [&](int64_t first, int64_t n) {
            const float* p = load_param(chunk, first, n, buffers.param);
            const float* g = load_gradient(chunk, call.sum, first, n, buffers.grad);
            with_states<Rule>(t, chunk, first, n, kept, key, true, [&](auto*... state) {
                prepare_block(rule, p, g, factor, buffers.direction, n, state...);
            });
            param.add(p, n);
            direction.add(buffers.direction, n);
        });
        squares[0] = param.sum();
        squares[1] = direction.sum();
    }
}

void prepare_chunk(const Table& t, const Call& call, int64_t i, double scale, LastRules& last) {
    const Chunk chunk(t, i);
    if (!has_gradient(chunk.row, call)) return;
    switch (chunk.rule()) {
#define PB_CASE(NUMBER, RULE) \
    case NUMBER:              \
        return prepare_rule<RULE>(t, call, chunk, scale, t.partials + 2 * i, last);
        PB_FOR_EACH_RULE(PB_CASE)
#undef PB_CASE
    }
}

void prepare_pass(const Table& t, const Call& call, const Verdict& verdict) {
    if (!call.prepare || verdict.skip) return;
    LastRules last;
    // Backwards: the gradients read last are still in the cache.
#pragma omp for schedule(dynamic)
    for (int64_t i = t.chunk_count - 1; i >= 0; --i) prepare_chunk(t, call, i, verdict.unscaled * verdict.clip, last);
#pragma omp single
    for (int64_t row = 0; row < t.row_count; ++row) {
        const int64_t* columns = t.rows + row * kColumns;
        if (norms_of(columns[kCode] / kStorages) != Norms::direction || !has_gradient(columns, call)) continue;
        for (int column = 0; column < kRowNorms; ++column)
            t.norms[row * kRowNorms + column] = t.share[row] * row_sum(t, row, column);
    }
}

// The update phase.

template <class Rule, class... State>
void update_block(const Rule rule, float* __restrict p, const float* __restrict g, float factor, int64_t n,
                  State* __restrict... state) {
    for (int64_t i = 0; i < n; ++i) {
        float s[kRoom<Rule>] = {state[i]...};
        float value = p[i];
        float grad = 0.0f;
        if constexpr (Rule::norms != Norms::direction) grad = g[i] * factor;
        rule.update(value, grad, s);
        p[i] = value;
        if constexpr (Rule::norms != Norms::direction) {  // else prepare() wrote them
            [[maybe_unused]] const float* from = s;
            ((state[i] = *from++), ...);
        }
    }
}

template <class Rule>
void update_rule(const Table& t, const Call& call, const Chunk& chunk, double scale, double* squares,
                 Last<Rule>& last) {
    Tensor at = tensor_of(t, chunk.row, chunk.index);
    const double* norms = t.norms + chunk.index * kRowNorms;
    at.param_sq = norms[kParamSq];
    at.other_sq = (Rule::norms == Norms::gradient ? scale * scale : 1.0) * norms[kDirectionSq];
    const Rule rule = last.made(at);
    const float factor = gradient_factor(at, scale);
    const uint32_t key = chunk_key(t, call, chunk, at);
    Lanes param;
    Buffers buffers;
    StateBuffers<Rule> kept;
    const bool in_place = Rule::norms == Norms::none && chunk.storage() == kFloat32 && t.states == kStateFloat32 &&
                          gradient_in_place(chunk, call.sum);
    constexpr bool write = Rule::norms != Norms::direction;  // else prepare() wrote them
    for_blocks(chunk, in_place, [&](int64_t first, int64_t n) {
        float* p = load_param(chunk, first, n, buffers.param);
        const float* g = nullptr;
        if constexpr (Rule::norms != Norms::direction) g = load_gradient(chunk, call.sum, first, n, buffers.grad);
        with_states<Rule>(t, chunk, first, n, kept, key, write,
                          [&](auto*... state) { update_block(rule, p, g, factor, n, state...); });
        store_param(chunk, first, n, p, key);
        if constexpr (Rule::norms == Norms::gradient) param.add(load_param(chunk, first, n, buffers.param), n);
    });
    if constexpr (Rule::norms == Norms::gradient) squares[0] = param.sum();
}

// After the rule has read the chunk's gradient, which is in the cache still.
void unscale(const Chunk& chunk, float scale) {
    Buffers buffers;
    for_blocks(chunk, gradient_in_place(chunk, false), [&](int64_t first, int64_t n) {
        const float* g = load_gradient(chunk, false, first, n, buffers.grad);
        float* to = gradient_in_place(chunk, false) ? chunk.at<float>(kGrad, first) : buffers.grad;
        for (int64_t i = 0; i < n; ++i) to[i] = quotient(g[i], scale);
        store_gradient(chunk, first, n, to);
    });
}

void update_chunk(const Table& t, const Call& call, int64_t i, double scale, LastRules& last) {
    const Chunk chunk(t, i);
    if (!has_gradient(chunk.row, call)) return;
    switch (chunk.rule()) {
#define PB_CASE(NUMBER, RULE)                                               \
    case NUMBER:                                                            \
        update_rule<RULE>(t, call, chunk, scale, t.partials + 2 * i, last); \
        break;
        PB_FOR_EACH_RULE(PB_CASE)
#undef PB_CASE
    }
    if (call.unscale) unscale(chunk, *call.grad_scale);
}

void update_pass(const Table& t, const Call& call, const Verdict& verdict) {
    if (verdict.skip) return;
    const double scale = verdict.unscaled * verdict.clip;
    const int64_t end = t.chunk_count - 1;
    const bool backwards = !call.prepare;  // against the order of the pass before
    LastRules last;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i <= end; ++i) update_chunk(t, call, backwards ? end - i : i, scale, last);
}

// After the last element was written, by one thread.
void finish(const Table& t, const Call& call, const Verdict& verdict) {
    const RingPlace place = ring_place(t.ledger);
    for (int64_t row = 0; row < t.row_count; ++row) {
        const int64_t* columns = t.rows + row * kColumns;
        const bool taken = has_gradient(columns, call);
        if (taken && !verdict.skip) {
            advance(t, columns, row);
            if (call.row_norms && carries(columns)) t.carried[row] = row_sum(t, row, 0);
        }
        if (t.layers && !call.follow) settle_layer(t.layers + row * kLayerSize, taken, place, call, verdict);
    }
    settle(t.ledger, t.ring, call, verdict);
}

// accumulate(): sum = [sum +] weight * g, with the sums of squares of g and of the new sum.

template <bool fresh>
void add_block(const float* g, float* sum, float weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] = fresh ? weight * g[i] : sum[i] + weight * g[i];
}

void add_chunk(const Table& t, const Call& call, int64_t i) {
    const Chunk chunk(t, i);
    double* squares = t.partials + 2 * i;
    squares[0] = squares[1] = 0.0;
    if (!chunk.row[kSum]) return;
    if (!chunk.row[kGrad]) {  // this micro-batch did not touch the tensor
        squares[1] = gradient_squares(chunk, true);
        return;
    }
    const float weight = float(call.weight);
    if (chunk.row[kGrad] == chunk.row[kSum] && weight == 1.0f) {  // the gradient is the sum: nothing to write
        squares[0] = squares[1] = gradient_squares(chunk, true);
        return;
    }
    Lanes small, large;
    Buffers buffers;
    for_blocks(chunk, false, [&](int64_t first, int64_t n) {
        const float* g = load_gradient(chunk, false, first, n, buffers.grad);
        float* sum = chunk.at<float>(kSum, first);
        small.add(g, n);
        chunk.row[kFresh] ? add_block<true>(g, sum, weight, n) : add_block<false>(g, sum, weight, n);
        large.add(sum, n);
    });
    squares[0] = small.sum();
    squares[1] = large.sum();
}

}  // namespace

void step(const Table& t, const Call& call) {
#pragma omp parallel num_threads(call.threads) if (t.elements > kSerial)
    {
        norm_pass(t, call);
        const Verdict verdict = judge(t.ledger, call);
        prepare_pass(t, call, verdict);
        update_pass(t, call, verdict);
    }
    finish(t, call, judge(t.ledger, call));
}

void norm(const Table& t, const Call& call) {
#pragma omp parallel num_threads(call.threads) if (t.elements > kSerial)
    norm_pass(t, call);
}

void prepare(const Table& t, const Call& call) {
#pragma omp parallel num_threads(call.threads) if (t.elements > kSerial)
    prepare_pass(t, call, judge(t.ledger, call));
}

void update(const Table& t, const Call& call) {
    const Verdict verdict = judge(t.ledger, call);
#pragma omp parallel num_threads(call.threads) if (t.elements > kSerial)
    update_pass(t, call, verdict);
    finish(t, call, verdict);
}

void accumulate(const Table& t, const Call& call) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) if (t.elements > kSerial)
    for (int64_t i = 0; i < t.chunk_count; ++i) add_chunk(t, call, i);
    double small = 0.0, large = 0.0;
    for (int64_t row = 0; row < t.row_count; ++row) {
        const double row_small = t.share[row] * row_sum(t, row, 0), row_large = t.share[row] * row_sum(t, row, 1);
        small += row_small;
        large += t.norms[row * kRowNorms + kDirectionSq] = row_large;
        if (!t.layers) continue;
        t.layers[row * kLayerSize + kLayerMicroSq] += call.examples * row_small;
        t.layers[row * kLayerSize + kLayerSumSq] = row_large;
    }
    t.ledger[kSumSq] = large;
    t.ledger[kMicroSq] += call.examples * small;
    if (!std::isfinite(small) || !std::isfinite(large)) t.ledger[kBad] = 1.0;
}

}  // namespace pybatch::PB_ISA
