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

// McCandlish et al. 2018, appendix A.1; the same arithmetic as pybatch.noise.estimator.pair, which the tests compare.
PB_HD void record_pair(double* ledger, double* ring, const Call& call, const Verdict& v) {
    const double large_n = call.examples, small_n = call.examples / call.micro_batches;
    if (ledger[kRingSteps] >= kRingRows * ledger[kRingLength]) {
        for (int row = 0; row < kRingRows; ++row)
            for (int i = 0; i < 3; ++i)
                ring[row * 3 + i] = row < kRingRows / 2 ? ring[row * 6 + i] + ring[row * 6 + 3 + i] : 0.0;
        ledger[kRingLength] *= 2.0;
    }
    double* row = ring + 3 * int(ledger[kRingSteps] / ledger[kRingLength]);
    ledger[kRingSteps] += 1.0;
    if (v.skip) return;
    const double scale = v.unscaled / call.inverse;  // AMP alone: micro-batch norms are of means already
    const double small = scale * scale * ledger[kMicroSq] / call.examples, large = v.norm * v.norm;
    row[0] += 1.0;
    row[1] += (large_n * large - small_n * small) / (large_n - small_n);
    row[2] += (small - large) / (1.0 / small_n - 1.0 / large_n);
    ledger[kPairs] += 1.0;
    ledger[kSmallSum] += small_n;
    ledger[kLargeSum] += large_n;
}

// Once per step, after the last element was written.
PB_HD void settle(double* ledger, double* ring, const Call& call, const Verdict& v) {
    if (call.noise) record_pair(ledger, ring, call, v);
    if (v.skip) ledger[kSkipped] += 1.0;
    ledger[kNorm] = v.norm;
    ledger[kClip] = v.clip;
    ledger[kSumSq] = ledger[kBad] = ledger[kMicroSq] = 0.0;
}

}  // namespace pybatch::PB_ISA
