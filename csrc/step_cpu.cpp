// The passes over a list of tensors on the CPU: vectorized by the compiler, threaded over chunks.
// Compiled once per vector width, with PB_ISA naming the width.
//
// Sums are float64 per lane and per chunk, and chunks are added in their order: the result does not depend on the
// number of threads. A float64 sum of float32 squares cannot overflow, so it is non-finite only where an element was.

#include <cmath>

#include "backend.h"
#include "ledger.h"
#include "number.h"
#include "rules.h"

namespace pybatch::PB_ISA {
namespace {

constexpr int kLanes = 32;            // independent sums: enough to hide the latency of an add at every width
constexpr int64_t kSerial = 1 << 15;  // elements; below it waking the threads takes longer than the work

struct Chunk {
    const int64_t* row;
    int64_t index, begin, size;

    Chunk(const Table& t, int64_t i)
        : row(t.rows + t.chunks[2 * i] * kColumns), index(t.chunks[2 * i]), begin(t.chunks[2 * i + 1] * t.chunk) {
        const int64_t left = row[kNumel] - begin;
        size = left < t.chunk ? left : t.chunk;
    }

    template <class T>
    T* at(int column) const {
        return reinterpret_cast<T*>(row[column]) + begin;
    }
};

struct Lanes {
    double lane[kLanes] = {};

    double sum() const {
        double partial[kLanes];
        for (int i = 0; i < kLanes; ++i) partial[i] = lane[i];
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
        return partial[0];
    }
};

template <class G>
double sum_squares(const G* g, int64_t n) {
    Lanes sum;
    const int64_t whole = n - n % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
            const double x = load(g[i + l]);
            sum.lane[l] += x * x;
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        const double x = load(g[i]);
        sum.lane[i - whole] += x * x;
    }
    return sum.sum();
}

// sum = [sum +] weight * g, with the sums of squares of g and of the new sum.
template <bool fresh, class G>
void add(const G* g, float* sum, float weight, int64_t n, double* squares) {
    Lanes small, large;
    const auto one = [&](int64_t i, int l) {
        const float x = load(g[i]);
        const float s = fresh ? weight * x : sum[i] + weight * x;
        sum[i] = s;
        small.lane[l] += double(x) * double(x);
        large.lane[l] += double(s) * double(s);
    };
    const int64_t whole = n - n % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) one(i + l, l);
    }
    for (int64_t i = whole; i < n; ++i) one(i, int(i - whole));
    squares[0] = small.sum();
    squares[1] = large.sum();
}

template <class Rule, class P, class G>
void update(const Rule rule, const Chunk& chunk, const G* __restrict g, float scale) {
    P* __restrict p = chunk.at<P>(kParam);
    float* __restrict s0 = Rule::states > 0 ? chunk.at<float>(kState0) : nullptr;
    float* __restrict s1 = Rule::states > 1 ? chunk.at<float>(kState1) : nullptr;
    float* __restrict s2 = Rule::states > 2 ? chunk.at<float>(kState2) : nullptr;
    const int64_t n = chunk.size;
    // Not "omp simd": GCC then gives s one array per lane and vectorizes nothing. __restrict is enough.
    for (int64_t i = 0; i < n; ++i) {
        float s[kMaxStates];
        if constexpr (Rule::states > 0) s[0] = s0[i];
        if constexpr (Rule::states > 1) s[1] = s1[i];
        if constexpr (Rule::states > 2) s[2] = s2[i];
        float value = load(p[i]);
        rule.update(value, load(g[i]) * scale, s);
        store(p[i], value);
        if constexpr (Rule::states > 0) s0[i] = s[0];
        if constexpr (Rule::states > 1) s1[i] = s[1];
        if constexpr (Rule::states > 2) s2[i] = s[2];
    }
}

template <class Rule, class P>
void update_row(const Table& t, const Call& call, const Chunk& chunk, double scale) {
    const double* hyper = t.hyper + chunk.row[kGroup] * kHyperColumns;
    const Rule rule = Rule::make(hyper, double(t.steps[chunk.index]) + 1.0);
    const float factor = float(hyper[kMaximize] != 0.0 ? -scale : scale);
    if (call.sum)
        update<Rule, P, float>(rule, chunk, chunk.at<float>(kSum), factor);
    else
        update<Rule, P, P>(rule, chunk, chunk.at<P>(kGrad), factor);
}

// Calls work(element type) for the row's dtype; the switch is per chunk, so the loops stay free of it.
template <class Work>
void with_dtype(int dtype, const Work& work) {
    switch (dtype) {
        case kFloat32:
            return work(float());
        case kBFloat16:
            return work(bfloat16());
#ifdef PB_FLOAT16
        case kFloat16:
            return work(float16());
#endif
    }
}

void take_squares(const Table& t, const Call& call, int64_t i) {
    const Chunk chunk(t, i);
    double* squares = t.partials + 2 * i;
    squares[0] = squares[1] = 0.0;
    if (!chunk.row[call.sum ? kSum : kGrad]) return;
    if (call.sum)
        squares[1] = sum_squares(chunk.at<float>(kSum), chunk.size);
    else
        with_dtype(int(chunk.row[kCode] % kDtypes),
                   [&](auto type) { squares[1] = sum_squares(chunk.at<decltype(type)>(kGrad), chunk.size); });
}

void add_chunk(const Table& t, const Call& call, int64_t i) {
    const Chunk chunk(t, i);
    double* squares = t.partials + 2 * i;
    squares[0] = squares[1] = 0.0;
    if (!chunk.row[kSum]) return;
    float* sum = chunk.at<float>(kSum);
    if (!chunk.row[kGrad]) {  // this micro-batch did not touch the tensor
        squares[1] = sum_squares(sum, chunk.size);
        return;
    }
    const float weight = float(call.weight);
    if (chunk.row[kGrad] == chunk.row[kSum] && weight == 1.0f) {  // the gradient is the sum: nothing to write
        squares[0] = squares[1] = sum_squares(sum, chunk.size);
        return;
    }
    with_dtype(int(chunk.row[kCode] % kDtypes), [&](auto type) {
        const auto* g = chunk.at<decltype(type)>(kGrad);
        chunk.row[kFresh] ? add<true>(g, sum, weight, chunk.size, squares)
                          : add<false>(g, sum, weight, chunk.size, squares);
    });
}

void update_chunk(const Table& t, const Call& call, int64_t i, double scale) {
    const Chunk chunk(t, i);
    if (!chunk.row[call.sum ? kSum : kGrad]) return;
    with_dtype(int(chunk.row[kCode] % kDtypes), [&](auto type) {
        using P = decltype(type);
        switch (chunk.row[kCode] / kDtypes) {
#define PB_CASE(NUMBER, RULE) \
    case NUMBER:              \
        return update_row<RULE, P>(t, call, chunk, scale);
            PB_FOR_EACH_RULE(PB_CASE)
#undef PB_CASE
        }
    });
}

void sum_partials(const Table& t, double& small, double& large) {
    small = large = 0.0;
    for (int64_t i = 0; i < t.chunk_count; ++i) {
        small += t.partials[2 * i];
        large += t.partials[2 * i + 1];
    }
}

}  // namespace

void step(const Table& t, const Call& call) {
    Verdict verdict;
#pragma omp parallel num_threads(call.threads) if (t.elements > kSerial)
    {
        if (call.norm) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < t.chunk_count; ++i) take_squares(t, call, i);
#pragma omp single
            {
                double small, large;
                sum_partials(t, small, large);
                t.ledger[kSumSq] = large;
                t.ledger[kBad] = std::isfinite(large) ? 0.0 : 1.0;
            }
        }
#pragma omp single
        verdict = judge(t.ledger, call);
        if (!verdict.skip) {
            // Backwards: the gradients read last are still in the cache.
#pragma omp for schedule(dynamic)
            for (int64_t i = t.chunk_count - 1; i >= 0; --i) update_chunk(t, call, i, verdict.unscaled * verdict.clip);
        }
    }
    if (!verdict.skip)
        for (int64_t row = 0; row < t.row_count; ++row)
            if (t.rows[row * kColumns + (call.sum ? kSum : kGrad)]) t.steps[row] += 1.0f;
    settle(t.ledger, t.ring, call, verdict);
}

void accumulate(const Table& t, const Call& call) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) if (t.elements > kSerial)
    for (int64_t i = 0; i < t.chunk_count; ++i) add_chunk(t, call, i);
    double small, large;
    sum_partials(t, small, large);
    t.ledger[kSumSq] = large;
    t.ledger[kMicroSq] += call.examples * small;
    if (!std::isfinite(small) || !std::isfinite(large)) t.ledger[kBad] = 1.0;
}

}  // namespace pybatch::PB_ISA
