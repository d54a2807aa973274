#include "plan.h"

#include <stdexcept>
#include <string>

namespace pybatch {

std::vector<int64_t> plan(const int64_t* sizes, int64_t count, int64_t chunk) {
    if (chunk < 1)
        throw std::invalid_argument("chunk " + std::to_string(chunk) + ": a chunk holds at least 1 element.");
    std::vector<int64_t> pairs;
    for (int64_t tensor = 0; tensor < count; ++tensor) {
        if (sizes[tensor] < 0)
            throw std::invalid_argument("size " + std::to_string(sizes[tensor]) + " of tensor " +
                                        std::to_string(tensor) + ": a tensor cannot hold fewer than 0 elements.");
        const int64_t chunks = sizes[tensor] / chunk + (sizes[tensor] % chunk != 0);
        for (int64_t i = 0; i < chunks; ++i) {
            pairs.push_back(tensor);
            pairs.push_back(i);
        }
    }
    return pairs;
}

}  // namespace pybatch
