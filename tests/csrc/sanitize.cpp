// Runs the CPU core over awkward lists under address and undefined-behaviour sanitizers: every rule, storage and dtype
// of gradient. Each tensor has a block of memory of its own that ends where the tensor ends.
// Prints how many lists it went through; a finding ends it. With "short" the sums of gradients lack their last element,
// which must be found. Built by tests/csrc/test_sanitize.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "backend.h"
#include "ledger.h"
#include "plan.h"
#include "rules.h"
#include "storage.h"

using namespace pybatch;
using plain::kColumns;
using plain::kHyperColumns;

namespace {

constexpr int64_t kChunk = 64;
const std::vector<int64_t> kSizes{5, 0, 1, kChunk - 1, kChunk, kChunk + 1, 37, 2 * kChunk + 33};
constexpr int kNoGradient = 3;  // this row has none
constexpr int64_t kElementBytes[] = {4, 2, 2};
const double kNan = std::nan("");
bool sums_are_short = false;

#ifdef PB_FLOAT16
constexpr bool kHasFloat16 = true;
#else
constexpr bool kHasFloat16 = false;
#endif

bool is_float16(int storage) {
    return storage == kFloat16 || storage == kFloat16Master || storage == kFloat16Stochastic;
}

struct Passes {
    void (*step)(const Table&, const Call&);
    void (*norm)(const Table&, const Call&);
    void (*prepare)(const Table&, const Call&);
    void (*update)(const Table&, const Call&);
    void (*accumulate)(const Table&, const Call&);
};

void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

class Memory {
  public:
    // The address of `bytes` bytes at a block's end; every other one is not aligned to a vector.
    int64_t take(int64_t bytes, int64_t element) {
        const int64_t shift = blocks_.size() % 2 ? element : 0;
        blocks_.push_back(std::make_unique<char[]>(bytes + shift));  // zeros
        return reinterpret_cast<int64_t>(blocks_.back().get() + shift);
    }

  private:
    std::vector<std::unique_ptr<char[]>> blocks_;
};

// Values in [-1, 1) of the dtype; the half types by their upper bits, which is near enough.
void fill(int64_t address, int64_t n, int dtype, uint32_t seed) {
    for (int64_t i = 0; i < n; ++i) {
        seed = seed * 1664525u + 1013904223u;
        const float x = float(seed >> 8) / float(1 << 23) - 1.0f;
        if (dtype == kGradFloat32)
            reinterpret_cast<float*>(address)[i] = x;
        else if (dtype == kGradBFloat16)
            reinterpret_cast<uint16_t*>(address)[i] = uint16_t(plain::bits_of(x) >> 16);
        else
            reinterpret_cast<uint16_t*>(address)[i] = uint16_t(0x3000u | (seed >> 20 & 0x83ffu));
    }
}

struct List {
    Memory memory;
    std::vector<int64_t> rows, chunks, starts;
    std::vector<double> hyper, share, norms, carried, layers, ledger, ring, partials;
    std::vector<float> steps, scalars;
    Table table{};
    Call call{};

    List(int rule, int states, int storage, int grad_type) {
        const int64_t count = kSizes.size();
        const int dtype = storage == kFloat32 ? kGradFloat32 : is_float16(storage) ? kGradFloat16 : kGradBFloat16;
        rows.assign(count * kColumns, 0);
        for (int64_t r = 0; r < count; ++r) {
            int64_t* row = rows.data() + r * kColumns;
            const int64_t n = kSizes[r], width = kElementBytes[dtype], grad_width = kElementBytes[grad_type];
            row[kParam] = memory.take(n * width, width);
            fill(row[kParam], n, dtype, uint32_t(r));
            row[kGrad] = r == kNoGradient ? 0 : memory.take(n * grad_width, grad_width);
            if (row[kGrad]) fill(row[kGrad], n, grad_type, uint32_t(100 + r));
            row[kSum] = r == kNoGradient ? 0 : memory.take((n - (sums_are_short && n)) * 4, 4);
            for (int s = 0; s < states; ++s) row[kState + s] = memory.take(n * 4, 4);
            if (storage == kBFloat16Master || storage == kFloat16Master) row[kMaster] = memory.take(n * 4, 4);
            if (storage == kBFloat16Remainder) row[kMaster] = memory.take(n * 2, 2);
            row[kNumel] = n;
            row[kCode] = rule * kStorages + storage;
            row[kGradType] = grad_type;
            row[kFresh] = 1;
            row[kSalt] = r;
        }
        chunks = plan(kSizes.data(), count, kChunk);
        const int64_t chunk_count = chunks.size() / 2;
        for (int64_t r = 0, i = 0; r <= count; ++r) {
            while (i < chunk_count && chunks[2 * i] < r) ++i;
            starts.push_back(i);
        }
        hyper = {1e-3, 0.0, 0.9, 0.99, 0.1, 0.01, 1.0, 0.0};
        hyper.resize(kHyperColumns);
        share.assign(count, 1.0);
        norms.assign(count * kRowNorms, 0.0);
        carried.assign(count, kNan);
        layers.assign(count * kLayerSize, 0.0);
        ledger.assign(kLedgerSize, 0.0);
        ledger[kRingLength] = 1.0;
        ring.assign(3 * kRingRows, 0.0);
        partials.assign(2 * chunk_count, 0.0);
        steps.assign(count, 0.0f);
        scalars.assign(count, 1.0f);
        table = Table{rows.data(),   count,         chunks.data(),  chunk_count,     starts.data(), kChunk,
                      hyper.data(),  steps.data(),  scalars.data(), share.data(),    norms.data(),  carried.data(),
                      layers.data(), ledger.data(), ring.data(),    partials.data(), nullptr,       1 << 20};
        call.inverse = call.weight = call.max_norm = 1.0;
        call.seed = 5;
        call.threads = 2;
        call.clip = true;
        const plain::Norms needed = plain::norms_of(rule);
        call.row_norms = needed == plain::Norms::gradient;
        call.prepare = needed == plain::Norms::direction;
    }

    void accumulate(const Passes& passes, double n, bool fresh) {
        for (size_t r = 0; r < kSizes.size(); ++r) rows[r * kColumns + kFresh] = fresh;
        call.examples = n;
        passes.accumulate(table, call);
    }
};

void go(const Passes& passes, int rule, int states, int storage, int grad_type) {
    List list(rule, states, storage, grad_type);
    Call& call = list.call;
    float scale = 2.0f, found = 0.0f;
    call.norm = true;
    call.grad_scale = &scale;
    call.found_inf = &found;
    passes.step(list.table, call);
    passes.norm(list.table, call);
    passes.prepare(list.table, call);
    passes.update(list.table, call);
    check(list.steps[0] == 2.0f && list.steps[kNoGradient] == 0.0f, "steps are counted where there is a gradient");

    found = 1.0f;
    passes.step(list.table, call);
    check(list.ledger[kSkip] == 1.0 && list.steps[0] == 2.0f, "a step is skipped");
    call.follow = true;
    call.norm = false;
    passes.step(list.table, call);
    check(list.steps[0] == 2.0f && list.ledger[kSkipped] == 1.0, "the verdict is followed");
    call.follow = false;
    found = 0.0f;

    call.sum = call.known = call.noise = true;
    for (int step = 0; step < 3; ++step) {
        list.accumulate(passes, 4.0, true);
        list.rows[kGrad] = 0;  // the second micro-batch does not touch this tensor
        list.accumulate(passes, 2.0, false);
        list.rows[kGrad] = list.rows[kSum];  // the third gives its gradient as the sum
        if (grad_type == kGradFloat32) list.accumulate(passes, 2.0, true);
        list.rows[kGrad] = 0;
        call.examples = 8.0;
        call.micro_batches = 3.0;
        passes.step(list.table, call);
    }
    check(list.layers[kLayerColumns] == 3.0 && list.ledger[kPairs] == 3.0, "pairs are recorded");
    check(std::isfinite(list.ledger[kNorm]) && list.ledger[kNorm] > 0.0, "the norm is finite");
}

// Enough steps for the rings to fold twice.
void fold(const Passes& passes) {
    List list(0, 0, kFloat32, kGradFloat32);
    Call& call = list.call;
    call.sum = call.known = call.noise = true;
    call.micro_batches = 2.0;
    for (int step = 0; step < 3 * kRingRows; ++step) {
        list.accumulate(passes, 4.0, true);
        list.accumulate(passes, 4.0, false);
        call.examples = 8.0;
        passes.step(list.table, call);
    }
    check(list.ledger[kRingLength] == 4.0, "the ring folds");
}

int all(const Passes& passes) {
    int lists = 0;
    const auto each = [&](int rule, int states) {
        for (int storage = 0; storage < kStorages; ++storage)
            for (int grad_type = 0; grad_type < kGradTypes; ++grad_type) {
                if (!kHasFloat16 && (is_float16(storage) || grad_type == kGradFloat16)) continue;
                go(passes, rule, states, storage, grad_type);
                ++lists;
            }
    };
#define PB_RULE(NUMBER, RULE) each(NUMBER, plain::RULE::states);
    PB_FOR_EACH_RULE(PB_RULE)
#undef PB_RULE
    fold(passes);
    return lists;
}

}  // namespace

#define PB_PASSES(ISA) \
    Passes { ISA::step, ISA::norm, ISA::prepare, ISA::update, ISA::accumulate }

int main(int count, char**) {
    sums_are_short = count > 1;
    int lists = all(PB_PASSES(portable));
#ifdef PB_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        lists += all(PB_PASSES(avx2));
#endif
    std::printf("%d\n", lists);
}
