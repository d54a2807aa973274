// Adam: Kingma & Ba 2015, algorithm 1, in torch.optim.Adam's form (decay added to the gradient, eps added after the
// bias correction). AMSGrad: Reddi et al. 2018. The moments serve AdamW and LAMB too.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct AdamHyper {
    PB_HYPER(beta1, beta2, eps, weight_decay);
};

struct AdamMoments {
    float rate1, beta2, rate2, size, correction2, eps;

    // Hyper: has beta1, beta2 and eps; lr: what move() is scaled by.
    template <class Hyper>
    PB_HD static AdamMoments make(const Tensor& at, double lr) {
        const double beta1 = at.hyper[Hyper::beta1], beta2 = at.hyper[Hyper::beta2];
        return {float(1.0 - beta1),
                float(beta2),
                float(1.0 - beta2),
                float(lr / (1.0 - power(beta1, at.step))),
                float(1.0 / sqrt(1.0 - power(beta2, at.step))),
                float(at.hyper[Hyper::eps])};
    }

    PB_HD void take(float g, float* s) const {
        s[0] += rate1 * (g - s[0]);
        s[1] = beta2 * s[1] + rate2 * (g * g);
    }

    PB_HD void take_with_peak(float g, float* s) const {
        take(g, s);
        s[2] = s[2] > s[1] ? s[2] : s[1];
    }

    PB_HD float move(float m, float v) const { return quotient(size * m, root(v) * correction2 + eps); }
};

struct Adam {
    using Hyper = AdamHyper;
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr unsigned squares = 1u << 1;
    static constexpr Norms norms = Norms::none;
    AdamMoments moments;
    float decay;

    PB_HD static Adam make(const Tensor& at) {
        return {AdamMoments::make<Hyper>(at, at.hyper[kLearningRate]), float(at.hyper[Hyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float* s) const {
        moments.take(plus(g, decay, p), s);
        p -= moments.move(s[0], s[1]);
    }
};

struct AdamAmsgrad {
    using Hyper = AdamHyper;
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    static constexpr unsigned squares = 1u << 1 | 1u << 2;
    static constexpr Norms norms = Norms::none;
    Adam base;

    PB_HD static AdamAmsgrad make(const Tensor& at) { return {Adam::make(at)}; }

    PB_HD void update(float& p, float g, float* s) const {
        base.moments.take_with_peak(plus(g, base.decay, p), s);
        p -= base.moments.move(s[0], s[2]);
    }
};

}  // namespace pybatch::PB_ISA
