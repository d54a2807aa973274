// The list of update rules. A rule's number stands in the `code` column of the table; numbers are never reused.
#pragma once

#include "adam.h"
#include "adamw.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "muon.h"
#include "sgd.h"

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
    X(10, MuonMove)

namespace pybatch::PB_ISA {

// The norms that the rule of this number needs.
PB_HD Norms norms_of(int64_t rule) {
#define PB_NORMS(NUMBER, RULE) \
    if (rule == NUMBER) return RULE::norms;
    PB_FOR_EACH_RULE(PB_NORMS)
#undef PB_NORMS
    return Norms::none;
}

}  // namespace pybatch::PB_ISA
