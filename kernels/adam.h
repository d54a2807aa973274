// Adam: Kingma & Ba 2015, algorithm 1, in torch.optim.Adam's form (decay added to the gradient, eps added after the
// bias correction). AMSGrad: Reddi et al. 2018. The moments serve AdamW and LAMB too.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct AdamHyper {
    static constexpr int beta1 = kHyperOwn, beta2 = kHyperOwn + 1, eps = kHyperOwn + 2, weight_decay = kHyperOwn + 3;
};

struct AdamMoments {
    float rate1, beta2, rate2, size, correction2, eps;

    // lr: what move() is scaled by.
    PB_HD static AdamMoments make(const double* hyper, double step, double lr) {
        const double beta1 = hyper[AdamHyper::beta1], beta2 = hyper[AdamHyper::beta2];
        return {float(1.0 - beta1),
                float(beta2),
                float(1.0 - beta2),
                float(lr / (1.0 - pow(beta1, step))),
                float(1.0 / sqrt(1.0 - pow(beta2, step))),
                float(hyper[AdamHyper::eps])};
    }

    PB_HD void take(float g, float* s) const {
        s[0] += rate1 * (g - s[0]);
        s[1] = beta2 * s[1] + rate2 * (g * g);
    }

    PB_HD void take_with_peak(float g, float* s) const {
        take(g, s);
        s[2] = s[2] > s[1] ? s[2] : s[1];
    }

    PB_HD float move(float m, float v) const { return size * m / (sqrtf(v) * correction2 + eps); }
};

struct Adam {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr Norms norms = Norms::none;
    AdamMoments moments;
    float decay;

    PB_HD static Adam make(const double* hyper, double step, double, double) {
        return {AdamMoments::make(hyper, step, hyper[kLearningRate]), float(hyper[AdamHyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float* s) const {
        moments.take(plus(g, decay, p), s);
        p -= moments.move(s[0], s[1]);
    }
};

struct AdamAmsgrad {
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    static constexpr Norms norms = Norms::none;
    Adam base;

    PB_HD static AdamAmsgrad make(const double* hyper, double step, double, double) {
        return {Adam::make(hyper, step, 0.0, 0.0)};
    }

    PB_HD void update(float& p, float g, float* s) const {
        base.moments.take_with_peak(plus(g, base.decay, p), s);
        p -= base.moments.move(s[0], s[2]);
    }
};

}  // namespace pybatch::PB_ISA
