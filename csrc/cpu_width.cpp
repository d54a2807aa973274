// Chooses the compiled vector width once, from what this CPU has.

#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"

namespace pybatch {
namespace {

using Pass = void (*)(const Table&, const Call&);

struct Width {
    const char* name;
    Pass step, norm, prepare, update, accumulate;
};

#define PB_WIDTH(ISA) \
    Width { #ISA, ISA::step, ISA::norm, ISA::prepare, ISA::update, ISA::accumulate }

// Those this CPU can run, the widest last.
std::vector<Width> usable() {
    std::vector<Width> widths{PB_WIDTH(portable)};
#ifdef PB_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        widths.push_back(PB_WIDTH(avx2));
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            widths.push_back(PB_WIDTH(avx512));
    }
#endif
    return widths;
}

Width& chosen() {
    static Width width = usable().back();
    return width;
}

}  // namespace

const char* cpu_width() { return chosen().name; }

std::vector<std::string> cpu_widths() {
    std::vector<std::string> names;
    for (const Width& width : usable()) names.emplace_back(width.name);
    return names;
}

void set_cpu_width(const std::string& name) {
    for (const Width& width : usable())
        if (name == width.name) {
            chosen() = width;
            return;
        }
    throw std::invalid_argument("width '" + name + "': this CPU or this build does not have it. See cpu_widths().");
}

void cpu_step(const Table& table, const Call& call) { chosen().step(table, call); }
void cpu_norm(const Table& table, const Call& call) { chosen().norm(table, call); }
void cpu_prepare(const Table& table, const Call& call) { chosen().prepare(table, call); }
void cpu_update(const Table& table, const Call& call) { chosen().update(table, call); }
void cpu_accumulate(const Table& table, const Call& call) { chosen().accumulate(table, call); }

}  // namespace pybatch
