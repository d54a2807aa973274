// The list of update rules. A rule's number stands in the `code` column of the table; numbers are never reused.
#pragma once

#include "adam.h"
#include "adamw.h"
#include "adan.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "sgd.h"
#include "table.h"

#define PB_FOR_EACH_RULE(X) \
    X(0, Sgd)               \
    X(1, SgdMomentum)       \
    X(2, AdamW)             \
    X(3, AdamWAmsgrad)      \
    X(4, Adam)              \
    X(5, AdamAmsgrad)       \
    X(6, Lion)              \
    X(7, Lars)              \
    X(8, Lamb)              \
    X(9, MuonMomentum)      \
    X(10, MuonMove)         \
    X(11, NAdam)            \
    X(12, Adan)

namespace pybatch::PB_ISA {

constexpr int larger(int a, int b) { return a > b ? a : b; }

// The most states and hyper-parameters of its own that a rule has.
#define PB_STATES(NUMBER, RULE) most = larger(most, RULE::states);
#define PB_COUNT(NUMBER, RULE) most = larger(most, RULE::Hyper::count);
constexpr int most_states() {
    int most = 0;
    PB_FOR_EACH_RULE(PB_STATES)
    return most;
}
constexpr int most_hyper() {
    int most = 0;
    PB_FOR_EACH_RULE(PB_COUNT)
    return most;
}
#undef PB_STATES
#undef PB_COUNT

constexpr int kMaxStates = most_states();
constexpr int kScale = kState + kMaxStates;              // and on: addresses of the fp32 scales of 8-bit states
constexpr int kColumns = kScale + kMaxStates;            // of the table
constexpr int kHyperColumns = kHyperOwn + most_hyper();  // of a group's row

// The norms that the rule of this number needs.
PB_HD Norms norms_of(int64_t rule) {
#define PB_NORMS(NUMBER, RULE) \
    if (rule == NUMBER) return RULE::norms;
    PB_FOR_EACH_RULE(PB_NORMS)
#undef PB_NORMS
    return Norms::none;
}

// Whether it keeps a scalar of each tensor, and that of this tensor after the step.
PB_HD bool keeps_scalar(int64_t rule) {
#define PB_KEEPS(NUMBER, RULE) \
    if (rule == NUMBER) return KeepsScalar<RULE>::value;
    PB_FOR_EACH_RULE(PB_KEEPS)
#undef PB_KEEPS
    return false;
}

template <class Rule>
PB_HD double next_scalar_of(const Tensor& at) {
    if constexpr (KeepsScalar<Rule>::value)
        return Rule::next(at);
    else
        return at.scalar;
}

PB_HD double next_scalar(int64_t rule, const Tensor& at) {
#define PB_NEXT(NUMBER, RULE) \
    if (rule == NUMBER) return next_scalar_of<RULE>(at);
    PB_FOR_EACH_RULE(PB_NEXT)
#undef PB_NEXT
    return at.scalar;
}

// A tensor as its rule sees it, without norms.
PB_HD Tensor tensor_of(const Table& t, const int64_t* columns, int64_t row) {
    return {t.hyper + columns[kGroup] * kHyperColumns, double(t.steps[row]) + 1.0, double(t.scalars[row]), 0.0, 0.0};
}

// Counts the step that was taken, once per tensor and after its last element was written.
PB_HD void advance(const Table& t, const int64_t* columns, int64_t row) {
    const int64_t rule = columns[kCode] / kStorages;
    if (keeps_scalar(rule)) t.scalars[row] = float(next_scalar(rule, tensor_of(t, columns, row)));
    t.steps[row] += 1.0f;
}

}  // namespace pybatch::PB_ISA
