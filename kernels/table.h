// The ABI between Python and every backend: plain tensors on the parameters' device, and the scalars of one call.
// pybatch/ops/ reads the constants from the compiled module; nothing else knows them.
#pragma once

#include <stdint.h>

namespace pybatch {

// Columns of the table, int64 [tensors, kColumns]; the states' come last, as many as some rule has,
// then as many for their scales.
enum Column : int {
    kParam,   // address
    kGrad,    // address; 0: no gradient this time
    kSum,     // address of the fp32 accumulated gradient; 0: none; equal to kGrad: the gradient becomes the sum
    kMaster,  // address of the fp32 master copy, or of the 16-bit remainder; 0: none
    kNumel,
    kCode,      // rule * kStorages + storage
    kGradType,  // GradType of kGrad
    kGroup,     // row of the hyper-parameters
    kFresh,     // accumulate: 1 where the sum holds nothing yet
    kSalt,      // stochastic rounding: the parameter's index over all groups
    kState      // and on: addresses of states, in the rule's order; 0 past its count. rules.h: kScale, kColumns
};

// Dtype of a gradient; the first three storages have the same numbers.
enum GradType : int { kGradFloat32, kGradBFloat16, kGradFloat16, kGradTypes };

// How a parameter is kept between steps; rules compute on its fp32 value. storage.h holds the conversions.
enum Storage : int {
    kFloat32,
    kBFloat16,
    kFloat16,
    kBFloat16Master,      // kMaster is the fp32 truth; the parameter is only written, rounded to nearest
    kFloat16Master,       // the same
    kBFloat16Remainder,   // kMaster holds the 16 low bits of the fp32 value whose rounded high half is the parameter
    kBFloat16Stochastic,  // no master: rounded up with a probability equal to the distance
    kFloat16Stochastic,
    kStorages
};

// How the states of a list are kept between steps; rules compute on fp32. narrow.h holds the conversions.
enum StateType : int { kStateFloat32, kStateBFloat16, kState8Bit, kStateTypes };
constexpr int64_t kStateBlock = 256;  // 8 bits: elements that share a scale; a chunk holds whole blocks

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
    kSkip,        // 1: the last step was left out
    kLedgerSize = 16
};

// Noise ring, float64 [kRingRows, 3]: count, sum of |G|^2 estimates, sum of tr(Sigma) estimates. One row holds
// kRingLength consecutive steps; a full ring folds adjacent rows together.
constexpr int kRingRows = 256;

// Noise per tensor, float64 [tensors, kLayerSize]: two sums since the last step, then a ring of kLayerBlocks rows like
// the one above. It folds when that one folds: row r there is row r / kLayerRatio here.
enum Layer : int {
    kLayerMicroSq,  // sum over micro-batches of n_i |g_i|^2, as kMicroSq
    kLayerSumSq,    // squares of the accumulated gradient, as kSumSq
    kLayerColumns
};
constexpr int kLayerBlocks = 32;
constexpr int kLayerSize = kLayerColumns + 3 * kLayerBlocks;
constexpr int kLayerRatio = kRingRows / kLayerBlocks;

// Norms of one tensor, float64 [tensors, kRowNorms]; between the phases Python may sum them over processes.
enum RowNorm : int {
    kParamSq,      // squares of the parameter before the update
    kDirectionSq,  // Norms::gradient: of the gradient as stored; Norms::direction: of the rule's direction
    kRowNorms
};

struct Table {
    const int64_t* rows;
    int64_t row_count;
    const int64_t* chunks;  // [chunk_count, 2]: row, chunk within the row
    int64_t chunk_count;
    const int64_t* starts;  // [row_count + 1]: first chunk of each row
    int64_t chunk;          // elements per chunk, a power of two
    const double* hyper;    // [groups, kHyperColumns]
    float* steps;           // [row_count]: updates each tensor has had
    float* scalars;         // [row_count]: what the rule keeps of each tensor from step to step, where it does
    const double* share;    // [row_count]: this process's share of a tensor's squares in sums over all processes
    double* norms;          // [row_count, kRowNorms]
    double* carried;        // [row_count]: |p|^2 the last update left; NaN: take it anew
    double* layers;         // [row_count, kLayerSize], or null
    double* ledger;
    double* ring;
    double* partials;  // [chunk_count, 2]
    unsigned* ticket;  // CUDA: blocks done; 0 between launches
    int64_t elements;  // in all rows
    int64_t states;    // StateType
};

// A step has three phases: norm (where asked), prepare (where asked), update, with what is decided once at its end.
struct Call {
    bool norm;                // step: take the norm of the gradients first
    bool known;               // step: accumulate() left the norm in the ledger, and each tensor's in Table.norms
    bool sum;                 // step: the gradient is the sum column
    bool noise;               // step: add a pair of norms to the rings
    bool clip;                // step: clip to max_norm
    bool row_norms;           // step: some rule has Norms::gradient; then norm or known is set
    bool prepare;             // step: some rule has Norms::direction
    bool unscale;             // step: leave every kGrad divided by *grad_scale, as torch's fused optimizers do
    bool follow;              // step: skip where the last step on this ledger was skipped; no clipping, no bookkeeping
    double max_norm;          // global L2 norm
    double inverse;           // step: factor from the sum to the mean over all examples
    double examples;          // step: N of all micro-batches; accumulate: n of this one
    double micro_batches;     // step: k
    double weight;            // accumulate: factor of this gradient in the sum
    uint64_t seed;            // stochastic rounding
    const float* grad_scale;  // AMP, on the device, or null
    const float* found_inf;   // AMP, on the device, or null
    int threads;              // CPU
};

}  // namespace pybatch
