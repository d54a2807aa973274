// The launch plan: which chunk of which tensor each block works on. A pure function of sizes.
#pragma once

#include <cstdint>
#include <vector>

namespace pybatch {

// Pairs (tensor, chunk within it), tensors in order, chunks ascending; every element lies in exactly one chunk of at
// most `chunk` elements. Tensors without elements have none. Throws std::invalid_argument on a negative size or chunk
// < 1.
std::vector<int64_t> plan(const int64_t* sizes, int64_t count, int64_t chunk);

}  // namespace pybatch
