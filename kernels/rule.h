// The contract of an update rule: its arithmetic is written once, for the CPU loop and the CUDA kernel.
//
// A rule is a struct with
//   states                how many state values an element has: any number
//   norms                 which norms of its whole tensor it needs first
//   Hyper                 its own hyper-parameters by name, a struct of PB_HYPER; several rules may share one
//   static Rule make(at)  the scalars of one tensor, in double
//   void update(p, g, s)  one element: parameter and states in place, g already unscaled, averaged, clipped
// Norms::gradient (LARS): the other norm is |g|^2, of the g that update() sees.
// Norms::direction (LAMB): two more functions. prepare(g, s) writes the states, direction(p, s) gives what the other
// norm is taken of; update() then reads the states only, its g is 0. prepare() is called on a rule made of zero norms.
// update() stays elementwise for all of them.
// A rule whose states are not all signed says which: bit k of `squares` is set where state k is never negative.
// A rule may keep one scalar of each tensor from step to step (a product of momenta), and then has two more members:
//   scalar                     its value before the first step
//   static double next(at)     its value after this step
#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

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

// base + coefficient * x, and the base alone where the coefficient is 0: 0 times infinity would be NaN. Coefficients
// are the same for a whole tensor.
PB_HD float plus(float base, float coefficient, float x) { return coefficient != 0.0f ? base + coefficient * x : base; }

// base to the power of a whole number: for all of a tensor's elements the first load waits for it, and pow takes
// longer.
PB_HD double power(double base, double whole) {
    double result = 1.0;
    for (uint64_t n = uint64_t(whole); n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

// Square root and quotient, on a GPU to 2 units in the last place: its correctly rounded ones branch off to a slow
// path, with registers spilled, where an operand is 0 or subnormal, as all moments of an unused embedding are.
PB_HD float root(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return sqrtf(x);
#endif
}
PB_HD float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
    float result;
    asm("div.full.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
    return result;
#else
    return x / y;
#endif
}

enum class Norms { none, gradient, direction };

// Columns of a group's row of hyper-parameters (float64) that every rule shares; a rule's own start at kHyperOwn.
constexpr int kLearningRate = 0;
constexpr int kMaximize = 1;  // 0 or 1; the loop applies it to the gradient
constexpr int kHyperOwn = 2;

// Inside a struct: a column for each name, in this order, and their number. The names are exported: optimizers give
// their values, and Triton finds their columns, by name.
#define PB_HYPER(...)                                                      \
    enum Own : int { before_own = kHyperOwn - 1, __VA_ARGS__, after_own }; \
    static constexpr int count = after_own - kHyperOwn;                    \
    static constexpr const char* names = #__VA_ARGS__

// What make() and next() read of a tensor.
struct Tensor {
    const double* hyper;  // its group's row
    double step;          // 1, 2, ...
    double scalar;        // what its rule keeps of it, before this step
    double param_sq;      // |p|^2 and the other norm, squared, where the rule has norms
    double other_sq;
};

// Room for the states of one element: C++ has no empty array.
template <class Rule>
constexpr int kRoom = Rule::states > 0 ? Rule::states : 1;

template <class Rule, class = void>
struct SquaredStates : std::integral_constant<unsigned, 0u> {};
template <class Rule>
struct SquaredStates<Rule, std::void_t<decltype(Rule::squares)>> : std::integral_constant<unsigned, Rule::squares> {};

// Whether a state of the rule can be negative.
template <class Rule>
PB_HD constexpr bool has_sign(int state) {
    return ((SquaredStates<Rule>::value >> state) & 1u) == 0u;
}

template <class Rule, class = void>
struct KeepsScalar : std::false_type {};
template <class Rule>
struct KeepsScalar<Rule, std::void_t<decltype(Rule::scalar)>> : std::true_type {};

}  // namespace pybatch::PB_ISA
