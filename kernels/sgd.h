// Stochastic gradient descent with momentum: Sutskever et al. 2013, in torch.optim.SGD's form (coupled decay, the first
// momentum is the gradient itself, without dampening).
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct SgdHyper {
    PB_HYPER(momentum, dampening, weight_decay, nesterov);
};

struct Sgd {
    using Hyper = SgdHyper;
    static constexpr int states = 0;
    static constexpr Norms norms = Norms::none;
    float lr, decay;

    PB_HD static Sgd make(const Tensor& at) {
        return {float(at.hyper[kLearningRate]), float(at.hyper[Hyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float*) const { p -= lr * plus(g, decay, p); }
};

struct SgdMomentum {
    using Hyper = SgdHyper;
    static constexpr int states = 1;  // momentum_buffer
    static constexpr Norms norms = Norms::none;
    float lr, decay, keep, add, ahead_g, ahead_b;

    PB_HD static SgdMomentum make(const Tensor& at) {
        const double momentum = at.hyper[Hyper::momentum];
        const bool first = at.step <= 1.0, nesterov = at.hyper[Hyper::nesterov] != 0.0;
        return {float(at.hyper[kLearningRate]), float(at.hyper[Hyper::weight_decay]),
                first ? 0.0f : float(momentum), first ? 1.0f : float(1.0 - at.hyper[Hyper::dampening]),
                nesterov ? 1.0f : 0.0f,         nesterov ? float(momentum) : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        g = plus(g, decay, p);
        s[0] = plus(add * g, keep, s[0]);
        p -= lr * plus(plus(0.0f, ahead_b, s[0]), ahead_g, g);
    }
};

}  // namespace pybatch::PB_ISA
