// Stochastic gradient descent with momentum: Sutskever et al. 2013, in torch.optim.SGD's form (coupled decay, the first
// momentum is the gradient itself, without dampening).
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct SgdHyper {
    static constexpr int momentum = kHyperOwn, dampening = kHyperOwn + 1, weight_decay = kHyperOwn + 2,
                         nesterov = kHyperOwn + 3;
};

struct Sgd {
    static constexpr int states = 0;
    static constexpr Norms norms = Norms::none;
    float lr, decay;

    PB_HD static Sgd make(const double* hyper, double, double, double) {
        return {float(hyper[kLearningRate]), float(hyper[SgdHyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float*) const { p -= lr * plus(g, decay, p); }
};

struct SgdMomentum {
    static constexpr int states = 1;  // momentum_buffer
    static constexpr Norms norms = Norms::none;
    float lr, decay, keep, add, ahead_g, ahead_b;

    PB_HD static SgdMomentum make(const double* hyper, double step, double, double) {
        const double momentum = hyper[SgdHyper::momentum];
        const bool first = step <= 1.0, nesterov = hyper[SgdHyper::nesterov] != 0.0;
        return {float(hyper[kLearningRate]),    float(hyper[SgdHyper::weight_decay]),
                first ? 0.0f : float(momentum), first ? 1.0f : float(1.0 - hyper[SgdHyper::dampening]),
                nesterov ? 1.0f : 0.0f,         nesterov ? float(momentum) : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        g = plus(g, decay, p);
        s[0] = plus(add * g, keep, s[0]);
        p -= lr * plus(plus(0.0f, ahead_b, s[0]), ahead_g, g);
    }
};

}  // namespace pybatch::PB_ISA
