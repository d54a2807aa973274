// What is decided once per step from the sums on the device: skip or not, the clip coefficient, the pair of noise
// norms.
#pragma once

#include "rule.h"
#include "table.h"

namespace pybatch::PB_ISA {

struct Verdict {
    bool skip;
    double norm;      // after unscaling, before clipping
    double clip;      // 1: not clipped
    double unscaled;  // factor from the stored gradient to the mean, unscaled one
};

PB_HD Verdict judge(const double* ledger, const Call& call) {
    if (call.follow) return {ledger[kSkip] != 0.0, ledger[kNorm], 1.0, 1.0};
    Verdict v;
    v.unscaled = call.inverse / (call.grad_scale ? double(*call.grad_scale) : 1.0);
    const bool taken = call.norm || call.known;
    v.skip = (call.found_inf && *call.found_inf != 0.0f) || (taken && ledger[kBad] != 0.0);
    v.norm = taken ? sqrt(ledger[kSumSq]) * v.unscaled : NAN;
    v.clip = 1.0;
    if (call.clip) {  // torch.nn.utils.clip_grad_norm_'s formula
        const double coefficient = call.max_norm / (v.norm + 1e-6);
        v.clip = coefficient < 1.0 ? coefficient : 1.0;
    }
    return v;
}

// Where the pair of this step goes: a row of the ring, after folding it where it is full.
struct RingPlace {
    bool fold;
    int row;
};

PB_HD RingPlace ring_place(const double* ledger) {
    const bool fold = ledger[kRingSteps] >= kRingRows * ledger[kRingLength];
    return {fold, fold ? kRingRows / 2 : int(ledger[kRingSteps] / ledger[kRingLength])};
}

PB_HD void fold_ring(double* ring, int rows) {
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < 3; ++i)
            ring[row * 3 + i] = row < rows / 2 ? ring[row * 6 + i] + ring[row * 6 + 3 + i] : 0.0;
}

// McCandlish et al. 2018, appendix A.1; the same arithmetic as pybatch.fits.noise.pair, which the tests compare.
// micro_sq and sum_sq as in the ledger.
PB_HD void add_pair(double* row, double micro_sq, double sum_sq, const Call& call, const Verdict& v) {
    const double large_n = call.examples, small_n = call.examples / call.micro_batches;
    const double scale = v.unscaled / call.inverse;  // AMP alone: micro-batch norms are of means already
    const double small = scale * scale * micro_sq / call.examples, large = v.unscaled * v.unscaled * sum_sq;
    row[0] += 1.0;
    row[1] += (large_n * large - small_n * small) / (large_n - small_n);
    row[2] += (small - large) / (1.0 / small_n - 1.0 / large_n);
}

// Once per tensor, before settle(). A tensor without gradient gets no pair.
PB_HD void settle_layer(double* layer, bool has_gradient, RingPlace place, const Call& call, const Verdict& v) {
    double* ring = layer + kLayerColumns;
    if (call.noise && place.fold) fold_ring(ring, kLayerBlocks);
    if (call.noise && has_gradient && !v.skip)
        add_pair(ring + 3 * (place.row / kLayerRatio), layer[kLayerMicroSq], layer[kLayerSumSq], call, v);
    layer[kLayerMicroSq] = layer[kLayerSumSq] = 0.0;
}

PB_HD void record_pair(double* ledger, double* ring, const Call& call, const Verdict& v) {
    const RingPlace place = ring_place(ledger);
    if (place.fold) {
        fold_ring(ring, kRingRows);
        ledger[kRingLength] *= 2.0;
    }
    ledger[kRingSteps] += 1.0;
    if (v.skip) return;
    add_pair(ring + 3 * place.row, ledger[kMicroSq], ledger[kSumSq], call, v);
    ledger[kPairs] += 1.0;
    ledger[kSmallSum] += call.examples / call.micro_batches;
    ledger[kLargeSum] += call.examples;
}

// Once per step, after the last element was written.
PB_HD void settle(double* ledger, double* ring, const Call& call, const Verdict& v) {
    if (call.follow) return;
    if (call.noise) record_pair(ledger, ring, call, v);
    if (v.skip) ledger[kSkipped] += 1.0;
    ledger[kSkip] = v.skip ? 1.0 : 0.0;
    ledger[kNorm] = v.norm;
    ledger[kClip] = v.clip;
    ledger[kSumSq] = ledger[kBad] = ledger[kMicroSq] = 0.0;
}

}  // namespace pybatch::PB_ISA
