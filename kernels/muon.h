// Muon: Jordan et al. 2024, in torch.optim.Muon's form. The two element-wise passes around the Newton-Schulz iteration,
// which is batched matrix products: MuonMomentum writes what is orthogonalized, MuonMove takes the result as gradient.
#pragma once

#include "rule.h"

namespace pybatch::PB_ISA {

struct MuonHyper {
    static constexpr int momentum = kHyperOwn, nesterov = kHyperOwn + 1;        // MuonMomentum
    static constexpr int weight_decay = kHyperOwn, adjustment = kHyperOwn + 1;  // MuonMove; of the rate, by the shape
};

// The "parameter" is a staging tensor: its old value is not used.
struct MuonMomentum {
    static constexpr int states = 1;  // momentum_buffer
    static constexpr Norms norms = Norms::none;
    float rate, ahead_g, ahead_b;

    PB_HD static MuonMomentum make(const double* hyper, double, double, double) {
        const double momentum = hyper[MuonHyper::momentum];
        const bool nesterov = hyper[MuonHyper::nesterov] != 0.0;
        return {float(1.0 - momentum), nesterov ? float(1.0 - momentum) : 0.0f, nesterov ? float(momentum) : 1.0f};
    }

    PB_HD void update(float& p, float g, float* s) const {
        s[0] += rate * (g - s[0]);
        p = plus(plus(0.0f, ahead_b, s[0]), ahead_g, g);
    }
};

struct MuonMove {
    static constexpr int states = 0;
    static constexpr Norms norms = Norms::none;
    float lr, shrink;

    PB_HD static MuonMove make(const double* hyper, double, double, double) {
        const double lr = hyper[kLearningRate];
        return {float(lr * hyper[MuonHyper::adjustment]), float(1.0 - lr * hyper[MuonHyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float*) const { p = shrink * p - lr * g; }
};

}  // namespace pybatch::PB_ISA
