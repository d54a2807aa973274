// LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2, with
// phi(x) = min(x, max_trust) applied to the ratio of norms (1 where either is 0). Hyper-parameters as in AdamHyper.
#pragma once

#include "adam.h"

namespace pybatch::PB_ISA {

struct LambHyper {
    static constexpr int max_trust = AdamHyper::weight_decay + 1;  // infinity: no bound
};

struct Lamb {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr Norms norms = Norms::direction;
    AdamMoments moments;
    float decay, scale;

    PB_HD static Lamb make(const double* hyper, double step, double param_sq, double direction_sq) {
        const double ratio = param_sq == 0.0 || direction_sq == 0.0 ? 1.0 : sqrt(param_sq / direction_sq);
        const double bound = hyper[LambHyper::max_trust];
        return {AdamMoments::make(hyper, step, 1.0), float(hyper[AdamHyper::weight_decay]),
                float(hyper[kLearningRate] * (ratio > bound ? bound : ratio))};
    }

    PB_HD void prepare(float g, float* s) const { moments.take(g, s); }
    PB_HD float direction(float p, const float* s) const { return plus(moments.move(s[0], s[1]), decay, p); }
    PB_HD void update(float& p, float, float* s) const { p -= scale * direction(p, s); }
};

}  // namespace pybatch::PB_ISA
