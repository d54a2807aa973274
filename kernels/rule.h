// The contract of an update rule: its arithmetic is written once, for the CPU loop and the CUDA kernel.
//
// A rule is a struct with
//   states                how many fp32 state values an element has (at most kMaxStates)
//   norms                 which norms of its whole tensor it needs first
//   static Rule make(hyper, step, param_sq, direction_sq)
//                         the scalars of one tensor, in double, from its group's row, its step (1, 2, ...) and, where
//                         the rule has norms, |p|^2 and the other norm, squared
//   void update(p, g, s)  one element: parameter and states in place, g already unscaled, averaged, clipped
// Norms::gradient (LARS): the other norm is |g|^2, of the g that update() sees.
// Norms::direction (LAMB): two more functions. prepare(g, s) writes the states, direction(p, s) gives what the other
// norm is taken of; update() then reads the states only, its g is 0. prepare() is called on a rule made of zero norms.
// update() stays elementwise for all of them.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define PB_HD __host__ __device__ __forceinline__
#else
#define PB_HD inline __attribute__((always_inline))
#endif

// The CPU loop is compiled once per vector width. Each compilation has its own namespace, so that the linker can not
// merge a function built for AVX-512 into the portable path.
#ifndef PB_ISA
#define PB_ISA plain
#endif

namespace pybatch::PB_ISA {

constexpr int kMaxStates = 3;

// base + coefficient * x, and the base alone where the coefficient is 0: 0 times infinity would be NaN. Coefficients
// are the same for a whole tensor.
PB_HD float plus(float base, float coefficient, float x) { return coefficient != 0.0f ? base + coefficient * x : base; }

enum class Norms { none, gradient, direction };

// Columns of a group's row of hyper-parameters (float64) that every rule shares; a rule's own start at kHyperOwn.
constexpr int kLearningRate = 0;
constexpr int kMaximize = 1;  // 0 or 1; the loop applies it to the gradient
constexpr int kHyperOwn = 2;
constexpr int kHyperColumns = 8;

}  // namespace pybatch::PB_ISA
