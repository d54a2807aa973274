// PTX text as data: what nvcc and Triton emit for sm_90, as far as this project's kernels use it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

// A register of the thread, or a constant.
struct Operand {
    int reg = -1;
    uint64_t value = 0;

    uint64_t of(const uint64_t* registers) const { return reg >= 0 ? registers[reg] : value; }
};

enum class Kind {
    arithmetic,
    unpack,
    pack,
    branch,
    branch_table,
    load,
    store,
    atomic,
    fence,
    barrier,
    shuffle,
    vote,
    largest,
    warp_barrier,
    call,
    ret
};
enum class Space { generic, global, shared, param };

// Registers every thread starts with; the program's own follow.
enum Special : int { kThreadIndex, kBlockIndex, kBlockCount, kThreadCount, kSpecials };

struct Function;
struct Instruction;
using Work = void (*)(const Instruction&, uint64_t* registers);

struct Instruction {
    Kind kind = Kind::arithmetic;
    Work work = nullptr;  // arithmetic
    int guard = -1;       // predicate register; -1: always
    bool negated = false;
    Space space = Space::generic;
    int bytes = 0;             // of one element of a load, store or pack
    bool is_signed = false;    // load: sign-extended
    std::vector<int> out;      // registers written; -1: none
    std::vector<Operand> in;   // operands read; of memory: the address first
    int64_t offset = 0;        // added to the address
    std::vector<int> targets;  // branch: instructions of the function
    const Function* callee = nullptr;
    std::vector<int> arguments;  // call: offsets in the caller's frame of parameters; the result's last
    mutable bool ran = false;    // by some thread so far
    int line = 0;                // of the PTX text
    std::string text;            // mnemonic, and what a warp operation does
};

struct Function {
    std::string name;
    std::vector<Instruction> body;
    int registers = kSpecials;
    int frame = 0;            // bytes of parameter space: its own parameters, then those of its calls
    std::vector<int> params;  // offsets of its own; a device function's result is the last
    int param_bytes = 0;      // of a kernel's parameters
    uint32_t threads = 0;     // of a block, where the kernel says so
};

constexpr uint64_t kConstants = uint64_t(1) << 60;

struct Program {
    std::map<std::string, std::unique_ptr<Function>> functions;
    std::vector<uint8_t> constants;  // tables in global memory, from address kConstants on
    uint32_t shared_bytes = 0;       // static; dynamic shared memory comes after
};

// Throws std::invalid_argument, with the line, for what the emulator does not know.
std::unique_ptr<Program> parse(const std::string& text);

// The work of an arithmetic instruction by its mnemonic; null where it is not known.
Work find_work(const std::string& mnemonic);

}  // namespace ptx
