// The ABI between Python and every backend: plain tensors on the parameters' device, and the scalars of one call.
// pybatch/ops.py reads the constants from the compiled module; nothing else knows them.
#pragma once

#include <stdint.h>

namespace pybatch {

// Columns of the table, int64 [tensors, kColumns].
enum Column : int {
    kParam,   // address
    kGrad,    // address; 0: no gradient this time
    kSum,     // address of the fp32 accumulated gradient; 0: none; equal to kGrad: the gradient becomes the sum
    kState0,  // addresses of fp32 states, in the rule's order; 0 past its count
    kState1,
    kState2,
    kNumel,
    kCode,   // rule * kDtypes + dtype
    kGroup,  // row of the hyper-parameters
    kFresh,  // accumulate: 1 where the sum holds nothing yet
    kColumns
};

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kDtypes };

// Scalars that stay on the device, float64 [kLedgerSize].
enum Ledger : int {
    kSumSq,       // sum of squares of the gradient the step will use, not yet unscaled or averaged
    kBad,         // 1: a non-finite gradient was seen since the last step
    kMicroSq,     // sum over micro-batches of n_i |g_i|^2, not yet unscaled
    kNorm,        // of the last step: global norm before clipping; NaN where it was not taken
    kClip,        // of the last step: clip coefficient
    kSkipped,     // steps left out for a non-finite gradient
    kPairs,       // noise: pairs of norms in the ring
    kSmallSum,    // noise: sum over pairs of the small batch size
    kLargeSum,    // noise: sum over pairs of the large batch size
    kRingSteps,   // noise: steps the ring has seen, since its last folding counted in blocks
    kRingLength,  // noise: steps per row of the ring, a power of two
    kLedgerSize = 16
};

// Noise ring, float64 [kRingRows, 3]: count, sum of |G|^2 estimates, sum of tr(Sigma) estimates. One row holds
// kRingLength consecutive steps; a full ring folds adjacent rows together.
constexpr int kRingRows = 256;

struct Table {
    const int64_t* rows;
    int64_t row_count;
    const int64_t* chunks;  // [chunk_count, 2]: row, chunk within the row
    int64_t chunk_count;
    int64_t chunk;        // elements per chunk
    const double* hyper;  // [groups, kHyperColumns]
    float* steps;         // [row_count]: updates each tensor has had
    double* ledger;
    double* ring;
    double* partials;  // [chunk_count, 2]
    unsigned* ticket;  // CUDA: blocks done; 0 between launches
    int64_t elements;  // in all rows
};

struct Call {
    bool norm;                // step: take the norm of the gradients first
    bool known;               // step: accumulate() left the norm in the ledger
    bool sum;                 // step: the gradient is the sum column
    bool noise;               // step: add a pair of norms to the ring
    bool clip;                // step: clip to max_norm
    double max_norm;          // global L2 norm
    double inverse;           // step: factor from the sum to the mean over all examples
    double examples;          // step: N of all micro-batches; accumulate: n of this one
    double micro_batches;     // step: k
    double weight;            // accumulate: factor of this gradient in the sum
    const float* grad_scale;  // AMP, on the device, or null
    const float* found_inf;   // AMP, on the device, or null
    int threads;              // CPU
};

}  // namespace pybatch
