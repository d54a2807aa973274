// Runs a kernel: many blocks at a time, their threads interleaved at random by a seed.
#pragma once

#include <random>
#include <span>

#include "faults.h"
#include "memory.h"
#include "program.h"

namespace ptx {

struct Launch {
    const Program* program;
    const Function* kernel;
    std::vector<uint8_t> params;
    uint32_t blocks, threads, shared_bytes;
    uint32_t resident;  // blocks at a time
    uint32_t seed;
};

struct Counts {
    uint64_t instructions = 0, launches = 0;
};

// Runs to the end, or to where no thread can go on, which is a fault too.
void run(const Launch& launch, Memory& memory, Faults& faults, Counts& counts);

}  // namespace ptx
