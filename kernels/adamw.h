// Adam with decoupled weight decay: Loshchilov & Hutter 2019, algorithm 2, in torch.optim.AdamW's form (decay scaled by
// the learning rate).
#pragma once

#include "adam.h"

namespace pybatch::PB_ISA {

struct AdamW {
    using Hyper = AdamHyper;
    static constexpr int states = 2;  // exp_avg, exp_avg_sq
    static constexpr unsigned squares = 1u << 1;
    static constexpr Norms norms = Norms::none;
    AdamMoments moments;
    float shrink;

    PB_HD static AdamW make(const Tensor& at) {
        const double lr = at.hyper[kLearningRate];
        return {AdamMoments::make<Hyper>(at, lr), float(1.0 - lr * at.hyper[Hyper::weight_decay])};
    }

    PB_HD void update(float& p, float g, float* s) const {
        moments.take(g, s);
        p = shrink * p - moments.move(s[0], s[1]);
    }
};

struct AdamWAmsgrad {
    using Hyper = AdamHyper;
    static constexpr int states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
    static constexpr unsigned squares = 1u << 1 | 1u << 2;
    static constexpr Norms norms = Norms::none;
    AdamW base;

    PB_HD static AdamWAmsgrad make(const Tensor& at) { return {AdamW::make(at)}; }

    PB_HD void update(float& p, float g, float* s) const {
        base.moments.take_with_peak(g, s);
        p = base.shrink * p - base.moments.move(s[0], s[2]);
    }
};

}  // namespace pybatch::PB_ISA
