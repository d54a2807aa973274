// LARS: You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks", algorithm 1 (eps added to the
// denominator of the local rate; a rate of 1 where either norm is 0).
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct LarsHyper {
    PB_HYPER(momentum, weight_decay, trust_coefficient, eps, nesterov);
};

struct Lars {
    using Hyper = LarsHyper;
    static constexpr int states = 1;  // momentum_buffer
    static constexpr Norms norms = Norms::gradient;
    float lr, local, decay, momentum, ahead_g, ahead_b;

    PB_HD static Lars make(const Tensor& at) {
        const double p = sqrt(at.param_sq), g = sqrt(at.other_sq), decay = at.hyper[Hyper::weight_decay];
        const double momentum = at.hyper[Hyper::momentum];
        const bool nesterov = at.hyper[Hyper::nesterov] != 0.0;
        const double both = decay != 0.0 ? g + decay * p : g;  // 0 times infinity would be NaN
        const double local =
            p == 0.0 || g == 0.0 ? 1.0 : at.hyper[Hyper::trust_coefficient] * p / (both + at.hyper[Hyper::eps]);
        return {float(at.hyper[kLearningRate]),   float(local), float(decay), float(momentum), nesterov ? 1.0f : 0.0f,
                nesterov ? float(momentum) : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        g = local * plus(g, decay, p);
        s[0] = plus(g, momentum, s[0]);
        p -= lr * plus(plus(0.0f, ahead_b, s[0]), ahead_g, g);
    }
};

}  // namespace pybatch::PB_ISA
