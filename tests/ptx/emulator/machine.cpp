#include "machine.h"

#include <bit>

namespace ptx {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint64_t kMostInstructions = 4'000'000'000;  // of a launch: far more than any test's

enum class State { ready, at_barrier, at_warp, done };

// Register files are handed on without being cleared: they are large, and a thread touches little of one.
class Registers {
  public:
    explicit Registers(int count) : count_(count) {
        auto& unused = unused_[count];
        if (unused.empty()) {
            file_ = std::make_unique_for_overwrite<uint64_t[]>(count);
        } else {
            file_ = std::move(unused.back());
            unused.pop_back();
        }
    }
    Registers(Registers&&) = default;
    ~Registers() {
        if (file_) unused_[count_].push_back(std::move(file_));
    }
    uint64_t& operator[](int i) { return file_[i]; }
    const uint64_t* data() const { return file_.get(); }
    uint64_t* data() { return file_.get(); }

  private:
    inline static std::unordered_map<int, std::vector<std::unique_ptr<uint64_t[]>>> unused_;
    int count_;
    std::unique_ptr<uint64_t[]> file_;
};

// A function under way.
struct Frame {
    const Function* function;
    size_t at = 0;
    Registers registers;
    std::vector<uint8_t> params;

    Frame(const Function& f, std::vector<uint8_t> bytes)
        : function(&f), registers(f.registers), params(std::move(bytes)) {
        params.resize(f.frame + 8);
    }
    const Instruction& next() const { return function->body[at]; }
};

struct Thread {
    uint32_t block, index;
    State state = State::ready;
    std::vector<Frame> frames;
    ThreadClock clock;
};

struct Block {
    BlockClock clock;
    std::vector<Thread> threads;
    std::vector<uint8_t> shared;
    Shadow shadow;
    uint32_t waiting = 0, left = 0;  // at the barrier; not yet at their end
};

class Machine {
  public:
    Machine(const Launch& launch, Memory& memory, Faults& faults, Counts& counts)
        : launch_(launch),
          memory_(memory),
          faults_(faults),
          counts_(counts),
          random_(launch.seed),
          blocks_(launch.blocks) {}

    void run() {
        std::vector<uint32_t> order(launch_.blocks);
        for (uint32_t i = 0; i < launch_.blocks; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), random_);
        auto waiting = order.begin();
        const uint64_t most = counts_.instructions + kMostInstructions;
        while (waiting != order.end() && resident_ < launch_.resident) start(*waiting++);
        while (!ready_.empty() && counts_.instructions < most) {
            const size_t place = random_() % ready_.size();
            Thread& thread = *ready_[place];
            // Mostly short turns; now and then one long enough to run far ahead of all others.
            advance(thread, 1 + random_() % (random_() % 8 ? 60 : 2000));
            if (thread.state == State::ready) continue;
            ready_[place] = ready_.back();
            ready_.pop_back();
            Block& block = blocks_[thread.block];
            if (thread.state == State::at_warp) {
                meet_warp(block, thread);
            } else {
                if (thread.state == State::at_barrier) ++block.waiting;
                if (thread.state == State::done && --block.left == 0) {
                    block = Block();
                    --resident_;
                    if (waiting != order.end()) start(*waiting++);
                } else if (block.waiting == block.left) {
                    meet_barrier(block);
                }
            }
        }
        if (resident_) report_stuck();
    }

  private:
    void start(uint32_t index) {
        Block& block = blocks_[index];
        block.shared.assign(launch_.shared_bytes, 0xab);
        block.threads.resize(launch_.threads);
        block.left = launch_.threads;
        for (uint32_t i = 0; i < launch_.threads; ++i) {
            Thread& thread = block.threads[i];
            thread.block = index, thread.index = i;
            Frame& frame = thread.frames.emplace_back(*launch_.kernel, launch_.params);
            frame.registers[kThreadIndex] = i, frame.registers[kBlockIndex] = index;
            frame.registers[kBlockCount] = launch_.blocks, frame.registers[kThreadCount] = launch_.threads;
            ready_.push_back(&thread);
        }
        ++resident_;
    }

    // So many instructions, or up to one where the thread must wait.
    void advance(Thread& thread, uint32_t turns) {
        for (; turns > 0 && thread.state == State::ready; --turns) {
            Frame& frame = thread.frames.back();
            const Instruction& i = frame.next();
            ++counts_.instructions;
            i.ran = true;
            if (i.guard >= 0 && bool(frame.registers[i.guard] & 1) == i.negated) {
                ++frame.at;
                continue;
            }
            execute(thread, frame, i);
        }
    }

    void execute(Thread& thread, Frame& frame, const Instruction& i) {
        uint64_t* r = frame.registers.data();
        switch (i.kind) {
            case Kind::arithmetic:
                i.work(i, r);
                ++frame.at;
                return;
            case Kind::branch:
                frame.at = i.targets[0];
                return;
            case Kind::branch_table: {
                const uint64_t index = i.in[0].of(r);
                if (index >= i.targets.size()) return stop(thread, i, "branch", "index beyond its table");
                frame.at = i.targets[index];
                return;
            }
            case Kind::unpack: {
                const uint64_t value = i.in[0].of(r);
                for (size_t k = 0; k < i.out.size(); ++k)
                    if (i.out[k] >= 0) r[i.out[k]] = value >> (8 * i.bytes * k) & low_bits(i.bytes);
                ++frame.at;
                return;
            }
            case Kind::pack: {
                uint64_t value = 0;
                for (size_t k = 0; k < i.in.size(); ++k)
                    value |= (i.in[k].of(r) & low_bits(i.bytes)) << (8 * i.bytes * k);
                r[i.out[0]] = value;
                ++frame.at;
                return;
            }
            case Kind::load:
                load(thread, frame, i);
                ++frame.at;
                return;
            case Kind::store:
                store(thread, frame, i);
                ++frame.at;
                return;
            case Kind::atomic:
                atomic(thread, frame, i);
                ++frame.at;
                return;
            case Kind::fence:
                blocks_[thread.block].clock.fence(thread.clock);
                ++frame.at;
                return;
            case Kind::barrier:
                thread.state = State::at_barrier;
                return;
            case Kind::shuffle:
            case Kind::vote:
            case Kind::largest:
            case Kind::warp_barrier:
                thread.state = State::at_warp;
                return;
            case Kind::call: {
                std::vector<uint8_t> bytes(i.callee->frame + 8);
                for (size_t k = 0; k < i.callee->params.size(); ++k)
                    std::memcpy(&bytes[i.callee->params[k]], &frame.params[i.arguments[k]], 8);
                thread.frames.emplace_back(*i.callee, std::move(bytes));
                return;
            }
            case Kind::ret:
                if (thread.frames.size() == 1) {
                    thread.state = State::done;
                    thread.frames.clear();
                    return;
                }
                leave(thread);
                return;
        }
    }

    static uint64_t low_bits(int bytes) { return bytes >= 8 ? ~uint64_t(0) : (uint64_t(1) << 8 * bytes) - 1; }

    void leave(Thread& thread) {
        const Frame done = std::move(thread.frames.back());
        thread.frames.pop_back();
        Frame& frame = thread.frames.back();
        const Instruction& call = frame.next();
        if (!call.arguments.empty())
            std::memcpy(&frame.params[call.arguments.back()], &done.params[done.function->params.back()], 8);
        ++frame.at;
    }

    void stop(Thread& thread, const Instruction& i, const std::string& kind, const std::string& what) {
        faults_.add(kind, i.line, what);
        thread.frames.clear();
        thread.state = State::done;
    }

    static bool fits(uint64_t address, uint64_t bytes, uint64_t size) {
        return bytes <= size && address <= size - bytes;
    }

    // Where an access of so many bytes goes; null, with a fault, where it must not. Notes it for the race detector.
    uint8_t* reach(Thread& thread, Frame& frame, const Instruction& i, uint32_t bytes, Shadow::Access access,
                   const uint8_t* values = nullptr) {
        const uint64_t address = i.in[0].of(frame.registers.data()) + uint64_t(i.offset);
        if (i.space == Space::param) {
            if (fits(address, bytes, frame.params.size())) return frame.params.data() + address;
            faults_.add("out of bounds", i.line, i.text + " of parameters");
            return nullptr;
        }
        Block& block = blocks_[thread.block];
        const auto place = [&] {
            return " by thread " + std::to_string(thread.index) + " of block " + std::to_string(thread.block);
        };
        if (address % bytes) {
            faults_.add("misaligned", i.line,
                        i.text + " at an address that " + std::to_string(bytes) + " does not divide" + place());
            return nullptr;
        }
        if (i.space == Space::shared) {
            if (!fits(address, bytes, block.shared.size())) {
                faults_.add("out of bounds", i.line, i.text + " of shared memory" + place());
                return nullptr;
            }
            if (access == Shadow::Access::read && !block.shadow.is_written(address))
                faults_.add("unwritten", i.line, i.text + " of shared memory that nobody wrote" + place());
            uint8_t* at = block.shared.data() + address;
            if (values && !std::memcmp(at, values, bytes)) access = Shadow::Access::repeat;
            note(block.shadow, address, bytes, thread, i, access, "shared memory");
            return at;
        }
        if (address >= kConstants && access == Shadow::Access::read) {
            const auto& table = launch_.program->constants;
            if (fits(address - kConstants, bytes, table.size()))
                return const_cast<uint8_t*>(&table[address - kConstants]);
            faults_.add("out of bounds", i.line, i.text + " of a table" + place());
            return nullptr;
        }
        int64_t offset = 0;
        Allocation* a = memory_.find(address, offset);
        if (!a || offset < 0 || uint64_t(offset) + bytes > a->size) {
            const std::string near =
                a ? " at byte " + std::to_string(offset) + " of " + a->name + " (" + std::to_string(a->size) + ")"
                  : " of no tensor";
            faults_.add("out of bounds", i.line, i.text + near + place());
            return nullptr;
        }
        if (values && !std::memcmp(a->bytes + offset, values, bytes)) access = Shadow::Access::repeat;
        const uint64_t first = offset / a->element, last = (offset + bytes - 1) / a->element;
        note(shadows_[a], first, last - first + 1, thread, i, access, a->name);
        return a->bytes + offset;
    }

    void note(Shadow& shadow, uint64_t first, uint64_t count, const Thread& thread, const Instruction& i,
              Shadow::Access access, const std::string& name) {
        const uint32_t threads = launch_.threads, own = thread.block * threads + thread.index;
        const BlockClock& clock = blocks_[thread.block].clock;
        uint32_t other = 0;
        const auto known = [&](uint32_t who, uint32_t time) {
            const bool before = clock.knows(thread.clock, who / threads, who % threads, time);
            if (!before) other = who;
            return before;
        };
        for (uint64_t cell = first; cell < first + count; ++cell) {
            if (shadow.touch(cell, access, own, thread.clock.time, threads * launch_.blocks, known)) continue;
            faults_.add("race", i.line,
                        i.text + " of element " + std::to_string(cell) + " of " + name + " by thread " +
                            std::to_string(thread.index) + " of block " + std::to_string(thread.block) +
                            " is not ordered with thread " + std::to_string(other % threads) + " of block " +
                            std::to_string(other / threads));
        }
    }

    void load(Thread& thread, Frame& frame, const Instruction& i) {
        const uint8_t* from = reach(thread, frame, i, i.bytes * uint32_t(i.out.size()), Shadow::Access::read);
        for (size_t k = 0; k < i.out.size(); ++k) {
            uint64_t value = 0;
            if (from) std::memcpy(&value, from + k * i.bytes, i.bytes);
            if (i.is_signed && i.bytes < 8) {
                const int shift = 64 - 8 * i.bytes;
                value = uint64_t(int64_t(value << shift) >> shift) & low_bits(std::max(4, i.bytes));
            }
            if (i.out[k] >= 0) frame.registers[i.out[k]] = value;
        }
    }

    void store(Thread& thread, Frame& frame, const Instruction& i) {
        uint8_t values[16];  // of the widest access
        const auto bytes = i.bytes * uint32_t(i.in.size() - 1);
        for (size_t k = 1; k < i.in.size(); ++k) {
            const uint64_t value = i.in[k].of(frame.registers.data());
            std::memcpy(values + (k - 1) * i.bytes, &value, i.bytes);
        }
        if (uint8_t* to = reach(thread, frame, i, bytes, Shadow::Access::write, values)) std::memcpy(to, values, bytes);
    }

    void atomic(Thread& thread, Frame& frame, const Instruction& i) {
        uint8_t* at = reach(thread, frame, i, 4, Shadow::Access::atomic);
        if (!at) return;
        blocks_[thread.block].clock.atomic(thread.clock, locations_[at], thread.block, thread.index, launch_.threads);
        uint32_t old;
        std::memcpy(&old, at, 4);
        const auto operand = uint32_t(i.in[1].of(frame.registers.data()));
        const uint32_t value = i.text == "atom.global.inc.u32" ? (old >= operand ? 0 : old + 1) : old + operand;
        std::memcpy(at, &value, 4);
        frame.registers[i.out[0]] = old;
    }

    void go_on(Thread& thread) {
        ++thread.frames.back().at;
        thread.state = State::ready;
        ready_.push_back(&thread);
    }

    // All threads of the block that have not ended have come to a barrier.
    void meet_barrier(Block& block) {
        const Instruction* first = nullptr;
        std::vector<ThreadClock*> clocks;
        for (Thread& thread : block.threads) {
            clocks.push_back(&thread.clock);
            if (thread.state != State::at_barrier) continue;
            const Instruction& here = thread.frames.back().next();
            if (first && first != &here)
                faults_.add("barrier", here.line, "threads of a block wait at different barriers");
            first = &here;
        }
        if (block.left < launch_.threads)
            faults_.add("barrier", first->line, "some threads of the block ended before it");
        block.clock.barrier(clocks, block.threads[0].block);
        block.waiting = 0;
        for (Thread& thread : block.threads)
            if (thread.state == State::at_barrier) go_on(thread);
    }

    // Runs a warp operation once all lanes of its mask have come to it.
    void meet_warp(Block& block, Thread& thread) {
        const std::span<Thread> warp{&block.threads[thread.index / kWarp * kWarp], kWarp};
        const Instruction& i = thread.frames.back().next();
        const auto mask = uint32_t(i.in.back().of(thread.frames.back().registers.data()));
        if (!(mask >> thread.index % kWarp & 1))
            faults_.add("warp", i.line, i.text + " by a lane that its mask leaves out");
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            if (warp[lane].state != State::at_warp) return;
            const Frame& frame = warp[lane].frames.back();
            if (&frame.next() != &i) return;
            if (uint32_t(i.in.back().of(frame.registers.data())) != mask)
                faults_.add("warp", i.line, i.text + " with different masks");
        }
        uint64_t offered[kWarp] = {};
        uint32_t votes = 0;
        int32_t largest = INT32_MIN;
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            offered[lane] = i.in[0].of(warp[lane].frames.back().registers.data());
            votes |= uint32_t(offered[lane] & 1) << lane;
            largest = std::max(largest, int32_t(offered[lane]));
        }
        for (uint32_t lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            uint64_t* r = warp[lane].frames.back().registers.data();
            uint64_t result = i.kind == Kind::largest ? uint32_t(largest) : votes;
            if (i.kind == Kind::shuffle) result = offered[source_lane(i, lane, r, mask)] & low_bits(4);
            if (!i.out.empty() && i.out[0] >= 0) r[i.out[0]] = result;
            if (i.out.size() > 1 && i.out[1] >= 0) r[i.out[1]] = 1;
        }
        if (i.kind == Kind::warp_barrier) order(warp, mask);
        for (uint32_t lane = 0; lane < kWarp; ++lane)
            if (mask >> lane & 1) go_on(warp[lane]);
    }

    // What each lane did comes before what the others do next. Shuffles, votes and largest values order no memory.
    void order(std::span<Thread> warp, uint32_t mask) {
        Clock all;
        for (const Thread& thread : warp)
            if (mask >> thread.index % kWarp & 1) {
                all.join(thread.clock.known);
                all.raise(thread.block, thread.index, thread.clock.time, launch_.threads);
            }
        for (Thread& thread : warp)
            if (mask >> thread.index % kWarp & 1) {
                thread.clock.known = all;
                ++thread.clock.time;
            }
    }

    uint32_t source_lane(const Instruction& i, uint32_t lane, const uint64_t* r, uint32_t mask) {
        const auto by = uint32_t(i.in[1].of(r)), bounds = uint32_t(i.in[2].of(r));
        if (bounds != 0x1f) faults_.add("warp", i.line, i.text + " within a part of the warp");
        const uint32_t source = (i.text.find(".bfly.") != std::string::npos ? lane ^ by : by) % kWarp;
        if (!(mask >> source & 1)) faults_.add("warp", i.line, i.text + " from a lane that its mask leaves out");
        return source;
    }

    void report_stuck() {
        for (const Block& block : blocks_)
            for (const Thread& thread : block.threads) {
                if (thread.state == State::done) continue;
                const Instruction& i = thread.frames.back().next();
                const char* kind = thread.state == State::at_barrier ? "barrier"
                                   : thread.state == State::at_warp  ? "warp"
                                                                     : "endless";
                faults_.add(kind, i.line, i.text + ": waits for threads that never come");
            }
    }

    const Launch& launch_;
    Memory& memory_;
    Faults& faults_;
    Counts& counts_;
    std::mt19937 random_;
    std::vector<Block> blocks_;
    std::vector<Thread*> ready_;
    uint32_t resident_ = 0;
    std::unordered_map<const Allocation*, Shadow> shadows_;
    std::unordered_map<const uint8_t*, Clock> locations_;
};

}  // namespace

void run(const Launch& launch, Memory& memory, Faults& faults, Counts& counts) {
    ++counts.launches;
    Machine(launch, memory, faults, counts).run();
}

}  // namespace ptx
