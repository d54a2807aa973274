// Sums of squares: float64 per lane, lanes added in a fixed order. A float64 sum of float32 squares cannot overflow, so
// it is non-finite only where an element was.
#pragma once

#include <stdint.h>

#include "rule.h"

namespace pybatch::PB_ISA {
namespace {

constexpr int kLanes = 32;  // independent sums: enough to hide the latency of an add at every width

// What the lanes add to with at most one value each, to the last bit: the others would add zeros.
inline double sum_of_few(const float* x, int n) {
    double square[kLanes];
    for (int i = 0; i < n; ++i) square[i] = double(x[i]) * double(x[i]);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l + half < (n < 2 * half ? n : 2 * half); ++l) square[l] += square[l + half];
    return n > 0 ? square[0] : 0.0;
}

class Lanes {
  public:
    // Blocks of one sum: every block but the last holds a multiple of kLanes, so that blocks do not change the result.
    void add(const float* x, int64_t n) {
        double sum[kLanes];  // registers; a member would be written in every turn
        for (int l = 0; l < kLanes; ++l) sum[l] = lane_[l];
        const int64_t whole = n - n % kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
            for (int l = 0; l < kLanes; ++l) sum[l] += double(x[i + l]) * double(x[i + l]);
        }
        for (int64_t i = whole; i < n; ++i) sum[i - whole] += double(x[i]) * double(x[i]);
        for (int l = 0; l < kLanes; ++l) lane_[l] = sum[l];
    }

    double sum() const {
        double partial[kLanes];
        for (int l = 0; l < kLanes; ++l) partial[l] = lane_[l];
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
        return partial[0];
    }

  private:
    double lane_[kLanes] = {};
};

}  // namespace
}  // namespace pybatch::PB_ISA
