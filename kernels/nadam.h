// NAdam: Dozat 2016, "Incorporating Nesterov Momentum into Adam", in torch.optim.NAdam's form: a momentum that grows
// along the run, decay added to the gradient or decoupled. The product of all momenta so far is kept of each tensor.
#pragma once

#include "adam.h"

namespace pybatch::PB_ISA {

struct NAdamHyper {
    PB_HYPER(beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay);
};

struct NAdam {
    using Hyper = NAdamHyper;
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr unsigned squares = 1u << 1;
    static constexpr Norms norms = Norms::none;
    static constexpr float scalar = 1.0f;  // mu_product
    AdamMoments moments;
    float shrink, decay, share_g, share_m;

    // mu_t; half of beta1 at first.
    PB_HD static double momentum(const Tensor& at, double step) {
        return at.hyper[Hyper::beta1] * (1.0 - 0.5 * pow(0.96, step * at.hyper[Hyper::momentum_decay]));
    }
    PB_HD static double next(const Tensor& at) { return at.scalar * momentum(at, at.step); }

    PB_HD static NAdam make(const Tensor& at) {
        const double lr = at.hyper[kLearningRate], decay = at.hyper[Hyper::weight_decay];
        const bool decoupled = at.hyper[Hyper::decoupled_weight_decay] != 0.0;
        const double product = next(at), ahead = momentum(at, at.step + 1.0);
        NAdam rule{AdamMoments::make<Hyper>(at, lr), decoupled ? float(1.0 - lr * decay) : 1.0f,
                   decoupled ? 0.0f : float(decay), float(lr * (1.0 - momentum(at, at.step)) / (1.0 - product)),
                   float(lr * ahead / (1.0 - product * ahead))};
        rule.moments.size = 1.0f;  // gradient and momentum have rates of their own
        return rule;
    }

    PB_HD void update(float& p, float g, float* s) const {
        g = plus(g, decay, p);
        moments.take(g, s);
        p = shrink * p - moments.move(plus(share_g * g, share_m, s[0]), s[1]);
    }
};

}  // namespace pybatch::PB_ISA
