// Adam with decoupled weight decay: Loshchilov & Hutter 2019, algorithm 2, in torch.optim.AdamW's form (decay scaled by
// the learning rate, eps added after the bias correction). AMSGrad: Reddi et al. 2018.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct AdamWHyper {
    static constexpr int beta1 = kHyperOwn, beta2 = kHyperOwn + 1, eps = kHyperOwn + 2, weight_decay = kHyperOwn + 3;
};

struct AdamW {
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    float shrink, rate1, beta2, rate2, step_size, correction2, eps;

    PB_HD static AdamW make(const double* hyper, double step) {
        const double lr = hyper[kLearningRate], beta1 = hyper[AdamWHyper::beta1], beta2 = hyper[AdamWHyper::beta2];
        return {float(1.0 - lr * hyper[AdamWHyper::weight_decay]),
                float(1.0 - beta1),
                float(beta2),
                float(1.0 - beta2),
                float(lr / (1.0 - pow(beta1, step))),
                float(1.0 / sqrt(1.0 - pow(beta2, step))),
                float(hyper[AdamWHyper::eps])};
    }

    PB_HD void moments(float g, float* s) const {
        s[0] += rate1 * (g - s[0]);
        s[1] = beta2 * s[1] + rate2 * (g * g);
    }

    PB_HD void move(float& p, float m, float v) const {
        p = shrink * p - step_size * m / (sqrtf(v) * correction2 + eps);
    }

    PB_HD void update(float& p, float g, float* s) const {
        moments(g, s);
        move(p, s[0], s[1]);
    }
};

struct AdamWAmsgrad {
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    AdamW base;

    PB_HD static AdamWAmsgrad make(const double* hyper, double step) { return {AdamW::make(hyper, step)}; }

    PB_HD void update(float& p, float g, float* s) const {
        base.moments(g, s);
        s[2] = s[2] > s[1] ? s[2] : s[1];
        base.move(p, s[0], s[2]);
    }
};

}  // namespace pybatch::PB_ISA
