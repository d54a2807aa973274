// LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2, with
// phi(x) = min(x, max_ratio) applied to the ratio of norms (1 where either is 0).
#pragma once

#include "adam.h"

namespace pybatch::PB_ISA {

struct LambHyper {
    PB_HYPER(beta1, beta2, eps, weight_decay, max_ratio);  // the last: infinity for no bound
};

struct Lamb {
    using Hyper = LambHyper;
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr unsigned squares = 1u << 1;
    static constexpr Norms norms = Norms::direction;
    AdamMoments moments;
    float decay, scale;

    PB_HD static Lamb make(const Tensor& at) {
        const double ratio = at.param_sq == 0.0 || at.other_sq == 0.0 ? 1.0 : sqrt(at.param_sq / at.other_sq);
        const double bound = at.hyper[Hyper::max_ratio];
        return {AdamMoments::make<Hyper>(at, 1.0), float(at.hyper[Hyper::weight_decay]),
                float(at.hyper[kLearningRate] * (ratio > bound ? bound : ratio))};
    }

    PB_HD void prepare(float g, float* s) const { moments.take(g, s); }
    PB_HD float direction(float p, const float* s) const { return plus(moments.move(s[0], s[1]), decay, p); }
    PB_HD void update(float& p, float, float* s) const { p -= scale * direction(p, s); }
};

}  // namespace pybatch::PB_ISA
