// The part of DLPack's stable C ABI (https://dmlc.github.io/dlpack, version 1) that reads a tensor without owning it.
#pragma once

#include <cstdint>

namespace pybatch::dlpack {

struct Tensor {
    void* data;
    struct {
        int32_t type, index;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *sizes, *strides;
    uint64_t byte_offset;
};

// Found as type(tensor).__dlpack_c_exchange_api__, a capsule of the name below.
struct ExchangeTable {
    uint32_t major, minor;
    void* previous;
    void* others[3];                         // allocator, owning exports: not used here
    int (*read)(void* object, Tensor* out);  // 0: done; else a Python error is set. May be null
};
constexpr const char* kTableName = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

}  // namespace pybatch::dlpack
