// Adan: Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", algorithm 1,
// in the form of its authors' implementation: betas are what is kept of each average, bias is corrected, the difference
// of gradients is 0 in the first step, decay is proximal or (no_prox) scales the parameter before the step.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct AdanHyper {
    PB_HYPER(beta1, beta2, beta3, eps, weight_decay, no_prox);
};

struct Adan {
    using Hyper = AdanHyper;
    static constexpr int states = 4;  // exp_avg, exp_avg_sq, exp_avg_diff, neg_pre_grad
    static constexpr unsigned squares = 1u << 1;
    static constexpr Norms norms = Norms::none;
    float rate1, rate2, beta2, beta3, rate3, size, size_diff, correction3, eps, before, after, known;

    PB_HD static Adan make(const Tensor& at) {
        const double lr = at.hyper[kLearningRate], decay = lr * at.hyper[Hyper::weight_decay];
        const double beta1 = at.hyper[Hyper::beta1], beta2 = at.hyper[Hyper::beta2], beta3 = at.hyper[Hyper::beta3];
        const bool proximal = at.hyper[Hyper::no_prox] == 0.0;
        return {float(1.0 - beta1),
                float(1.0 - beta2),
                float(beta2),
                float(beta3),
                float(1.0 - beta3),
                float(lr / (1.0 - power(beta1, at.step))),
                float(lr * beta2 / (1.0 - power(beta2, at.step))),
                float(1.0 / sqrt(1.0 - power(beta3, at.step))),
                float(at.hyper[Hyper::eps]),
                proximal ? 1.0f : float(1.0 - decay),
                proximal ? float(1.0 / (1.0 + decay)) : 1.0f,
                at.step <= 1.0 ? 0.0f : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        const float difference = plus(0.0f, known, g + s[3]), ahead = plus(g, beta2, difference);
        s[0] += rate1 * (g - s[0]);
        s[1] = beta3 * s[1] + rate3 * (ahead * ahead);
        s[2] += rate2 * (difference - s[2]);
        s[3] = -g;
        p = after * (before * p - quotient(plus(size * s[0], size_diff, s[2]), root(s[1]) * correction3 + eps));
    }
};

}  // namespace pybatch::PB_ISA
