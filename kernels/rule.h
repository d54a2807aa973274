// The contract of an update rule: its arithmetic is written once, for the CPU loop and the CUDA kernel.
//
// A rule is a struct with
//   states                          how many fp32 state values an element has (at most kMaxStates)
//   static Rule make(hyper, step)   the scalars of one tensor, in double, from its group's row and its step (1, 2, ...)
//   void update(p, g, s) const      one element: parameter and states in place, g already unscaled, averaged, clipped
// Elementwise rules need no more. A rule that needs norms of its whole tensor first (LARS, LAMB) gets them as a further
// argument of make(): they are a tensor's scalars too, and update() stays elementwise.
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

// Columns of a group's row of hyper-parameters (float64) that every rule shares; a rule's own start at kHyperOwn.
constexpr int kLearningRate = 0;
constexpr int kMaximize = 1;  // 0 or 1; the loop applies it to the gradient
constexpr int kHyperOwn = 2;
constexpr int kHyperColumns = 8;

}  // namespace pybatch::PB_ISA
