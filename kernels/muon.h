// Muon: Jordan et al. 2024, in torch.optim.Muon's form. The two element-wise passes around the Newton-Schulz iteration,
// which is batched matrix products: MuonMomentum writes what is orthogonalized, MuonMove takes the result as gradient.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct MuonMomentumHyper {
    PB_HYPER(momentum, nesterov);
};
struct MuonMoveHyper {
    PB_HYPER(weight_decay, adjustment);  // the last: of the rate, by the shape
};

// The "parameter" is a staging tensor: its old value is not used.
struct MuonMomentum {
    using Hyper = MuonMomentumHyper;
    static constexpr int states = 1;  // momentum_buffer
    static constexpr Norms norms = Norms::none;
    float rate, ahead_g, ahead_b;

    PB_HD static MuonMomentum make(const Tensor& at) {
        const double momentum = at.hyper[Hyper::momentum];
        const bool nesterov = at.hyper[Hyper::nesterov] != 0.0;
        return {float(1.0 - momentum), nesterov ? float(1.0 - momentum) : 0.0f, nesterov ? float(momentum) : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        s[0] += rate * (g - s[0]);
        p = plus(plus(0.0f, ahead_b, s[0]), ahead_g, g);
    }
};

struct MuonMove {
    using Hyper = MuonMoveHyper;
    static constexpr int states = 0;
    static constexpr Norms norms = Norms::none;
    float lr, shrink;

    PB_HD static MuonMove make(const Tensor& at) {
        const double lr = at.hyper[kLearningRate];
        return {float(lr * at.hyper[Hyper::adjustment]), float(1.0 - lr * at.hyper[Hyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float*) const { p = shrink * p - lr * g; }
};

}  // namespace pybatch::PB_ISA
