// Chooses the compiled vector width once, from what this CPU has.

#include "backend.h"

namespace pybatch {
namespace {

using Pass = void (*)(const Table&, const Call&);

struct Width {
    const char* name;
    Pass step, accumulate;
};

Width widest() {
#ifdef PB_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return {"avx512", avx512::step, avx512::accumulate};
    if (fma) return {"avx2", avx2::step, avx2::accumulate};
#endif
    return {"portable", portable::step, portable::accumulate};
}

const Width& width() {
    static const Width chosen = widest();
    return chosen;
}

}  // namespace

const char* cpu_width() { return width().name; }
void cpu_step(const Table& table, const Call& call) { width().step(table, call); }
void cpu_accumulate(const Table& table, const Call& call) { width().accumulate(table, call); }

}  // namespace pybatch
