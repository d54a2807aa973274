// Lion: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct LionHyper {
    PB_HYPER(beta1, beta2, weight_decay);
};

struct Lion {
    using Hyper = LionHyper;
    static constexpr int states = 1;  // exp_avg
    static constexpr Norms norms = Norms::none;
    float lr, shrink, rate1, rate2;

    PB_HD static Lion make(const Tensor& at) {
        const double lr = at.hyper[kLearningRate];
        return {float(lr), float(1.0 - lr * at.hyper[Hyper::weight_decay]), float(1.0 - at.hyper[Hyper::beta1]),
                float(1.0 - at.hyper[Hyper::beta2])};
    }

    PB_HD void update(float& p, float g, float* s) const {
        const float c = s[0] + rate1 * (g - s[0]);
        const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // of 0: 0; of NaN: NaN
        p = shrink * p - lr * sign;
        s[0] += rate2 * (g - s[0]);
    }
};

}  // namespace pybatch::PB_ISA
