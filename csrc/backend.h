// The entry points every compiled backend has: step() is its three phases in one; accumulate().
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace pybatch {

// One implementation per vector width of the CPU.
#define PB_DECLARE_CPU(ISA)                     \
    namespace ISA {                             \
    void step(const Table&, const Call&);       \
    void norm(const Table&, const Call&);       \
    void prepare(const Table&, const Call&);    \
    void update(const Table&, const Call&);     \
    void accumulate(const Table&, const Call&); \
    }
PB_DECLARE_CPU(portable)
#ifdef PB_X86
PB_DECLARE_CPU(avx2)
PB_DECLARE_CPU(avx512)
#endif

// The widest vector extension this CPU has, among those compiled in: "portable", "avx2", "avx512".
const char* cpu_width();
std::vector<std::string> cpu_widths();        // all that can run here, the widest last
void set_cpu_width(const std::string& name);  // for tests; throws std::invalid_argument where it can not run
void cpu_step(const Table&, const Call&);
void cpu_norm(const Table&, const Call&);
void cpu_prepare(const Table&, const Call&);
void cpu_update(const Table&, const Call&);
void cpu_accumulate(const Table&, const Call&);

#ifdef PB_CUDA
// On the stream given, of the current device; return a cudaError_t (0: launched).
int cuda_step(const Table&, const Call&, void* stream);
int cuda_norm(const Table&, const Call&, void* stream);
int cuda_prepare(const Table&, const Call&, void* stream);
int cuda_update(const Table&, const Call&, void* stream);
int cuda_accumulate(const Table&, const Call&, void* stream);
// Devices seen by the driver; a negative value is minus the driver's error code.
int cuda_devices();
const char* cuda_error_name(int code);
const char* cuda_error_text(int code);
#endif

}  // namespace pybatch
