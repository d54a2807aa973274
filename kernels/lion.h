// Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct LionHyper {
    static constexpr int beta1 = kHyperOwn, beta2 = kHyperOwn + 1, weight_decay = kHyperOwn + 2;
};

struct Lion {
    static constexpr int states = 1;  // exp_avg
    static constexpr Norms norms = Norms::none;
    float lr, shrink, rate1, rate2;

    PB_HD static Lion make(const double* hyper, double, double, double) {
        const double lr = hyper[kLearningRate];
        return {float(lr), float(1.0 - lr * hyper[LionHyper::weight_decay]), float(1.0 - hyper[LionHyper::beta1]),
                float(1.0 - hyper[LionHyper::beta2])};
    }

    PB_HD void update(float& p, float g, float* s) const {
        const float c = s[0] + rate1 * (g - s[0]);
        const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // of 0: 0; of NaN: NaN
        p = shrink * p - lr * sign;
        s[0] += rate2 * (g - s[0]);
    }
};

}  // namespace pybatch::PB_ISA
