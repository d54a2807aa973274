// The emulator behind a C interface, and the project's own launches on it (csrc/step_cuda.cpp).

#include <cuda_runtime.h>  // the host's, in tests/kernels/cuda_on_host

#include <stdexcept>

#include "machine.h"
#include "table.h"

#define PB_CUDA
#include "step_cuda.cpp"

namespace {

// Parsed when a launch or a question first needs it.
struct Source {
    std::string text;
    std::unique_ptr<ptx::Program> parsed;

    ptx::Program& program() {
        if (!parsed) parsed = ptx::parse(text);
        return *parsed;
    }
};

struct Emulator {
    std::vector<Source> programs;
    ptx::Memory memory;
    ptx::Faults faults;
    ptx::Counts counts;
    std::string message, error;
    uint32_t seed = 1, resident = 6;
};

Emulator* current = nullptr;  // whose launch is under way

template <class Call>
int guarded(Emulator* emulator, const Call& call) {
    try {
        call();
        return emulator->faults.empty() ? 0 : cudaErrorLaunchFailure;
    } catch (const std::exception& error) {
        emulator->error = error.what();
        return -1;
    }
}

void launch(Emulator& e, const std::string& kernel, std::vector<uint8_t> params, uint32_t blocks, uint32_t shared) {
    for (auto& source : e.programs) {
        if (source.text.find(kernel) == std::string::npos) continue;
        const auto& program = source.program();
        for (const auto& [name, function] : program.functions) {
            if (name.find(kernel) == std::string::npos) continue;
            params.resize(function->param_bytes);
            e.memory.translate();
            e.memory.translate(params);
            ptx::run({&program, function.get(), params, blocks, function->threads, program.shared_bytes + shared,
                      e.resident, e.seed++},
                     e.memory, e.faults, e.counts);
            return;
        }
    }
    throw std::invalid_argument("no program has a kernel " + kernel);
}

// As chunk.cuh's: a table and a call, each at the alignment of its widest member.
cudaError_t launch_pass(const std::string& name, const pybatch::Table& table, const pybatch::Call& call) {
    std::vector<uint8_t> params(sizeof table + sizeof call);
    static_assert(sizeof table % alignof(pybatch::Call) == 0);
    std::memcpy(params.data(), &table, sizeof table);
    std::memcpy(params.data() + sizeof table, &call, sizeof call);
    const std::string mangled = std::to_string(name.size()) + name;
    launch(*current, mangled, std::move(params), table.chunk_count > 0 ? uint32_t(table.chunk_count) : 1, 0);
    return current->faults.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

namespace pybatch::PB_ISA {

#define PTX_LAUNCH(NAME)                                                     \
    cudaError_t launch_##NAME(const Table& t, const Call& c, cudaStream_t) { \
        return launch_pass(#NAME "_kernel", t, c);                           \
    }
PTX_LAUNCH(norm)
PTX_LAUNCH(prepare)
PTX_LAUNCH(update)
PTX_LAUNCH(narrow_prepare)
PTX_LAUNCH(narrow_update)
PTX_LAUNCH(accumulate)

}  // namespace pybatch::PB_ISA

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

PTX_EXPORT Emulator* ptx_new(uint32_t seed, uint32_t resident) {
    auto* emulator = new Emulator;
    emulator->seed = seed, emulator->resident = resident;
    return emulator;
}
PTX_EXPORT void ptx_delete(Emulator* e) { delete e; }

PTX_EXPORT int ptx_load(Emulator* e, const char* text) {
    return guarded(e, [&] { e->programs.push_back({text, nullptr}); });
}

// All memory of the launches that follow; `addresses`: its words may be addresses of others.
PTX_EXPORT void ptx_forget(Emulator* e) { e->memory = ptx::Memory(); }
PTX_EXPORT void ptx_add(Emulator* e, const char* name, void* host, uint64_t bytes, uint32_t element, bool addresses) {
    e->memory.add(name, host, bytes, element, addresses);
}

PTX_EXPORT int ptx_launch(Emulator* e, const char* kernel, const uint8_t* params, uint64_t bytes, uint32_t blocks,
                          uint32_t shared) {
    return guarded(e, [&] { launch(*e, kernel, {params, params + bytes}, blocks, shared); });
}

// "step", one of its phases, or "accumulate".
PTX_EXPORT int ptx_pass(Emulator* e, const char* entry, const pybatch::Table* table, const pybatch::Call* call) {
    current = e;
    return guarded(e, [&] {
        const std::string name = entry;
        const auto pass = name == "step"      ? pybatch::cuda_step
                          : name == "norm"    ? pybatch::cuda_norm
                          : name == "prepare" ? pybatch::cuda_prepare
                          : name == "update"  ? pybatch::cuda_update
                                              : pybatch::cuda_accumulate;
        pass(*table, *call, nullptr);
    });
}

PTX_EXPORT const char* ptx_faults(Emulator* e) { return (e->message = e->faults.text()).c_str(); }
// PTX lines of the program of this number whose instructions some thread ran (else: none did), separated by blanks.
PTX_EXPORT const char* ptx_lines(Emulator* e, uint32_t program, bool ran) {
    e->message.clear();
    for (const auto& [name, function] : e->programs.at(program).program().functions)
        for (const auto& i : function->body)
            if (i.line && i.ran == ran) e->message += std::to_string(i.line) + " ";
    return e->message.c_str();
}
PTX_EXPORT const char* ptx_error(Emulator* e) { return e->error.c_str(); }
PTX_EXPORT void ptx_counts(Emulator* e, uint64_t* instructions, uint64_t* launches) {
    *instructions = e->counts.instructions, *launches = e->counts.launches;
}
