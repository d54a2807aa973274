// Device memory with exact bounds, and for every element who touched it last.
//
// An allocation is an array of the host under a device address of its own, 2^36 bytes from the next: an address that is
// off by anything leaves its allocation and never lands in another. Its low 12 bits are the host's, and so is its
// alignment. Tables of addresses are copied at a launch, with every word that is the beginning of an allocation in the
// host replaced by its device address.
#pragma once

#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"

namespace ptx {

struct Allocation {
    std::string name;
    uint8_t* bytes;  // where the values are: the host's array or a translated copy
    uint64_t host, size;
    uint32_t element;  // bytes whose accesses are told apart
    std::vector<uint8_t> copy;
};

class Memory {
  public:
    void add(const std::string& name, void* host, uint64_t size, uint32_t element, bool addresses) {
        const auto place = reinterpret_cast<uint64_t>(host);
        if (!size || !by_host_.try_emplace(place, allocations_.size()).second) return;
        allocations_.push_back({name, static_cast<uint8_t*>(host), place, size, element, {}});
        if (addresses) allocations_.back().copy.assign(allocations_.back().bytes, allocations_.back().bytes + size);
    }

    void translate() {
        for (Allocation& a : allocations_) {
            if (a.copy.empty()) continue;
            translate(a.copy);
            a.bytes = a.copy.data();
        }
    }
    void translate(std::vector<uint8_t>& words) const {
        for (size_t i = 0; i + 8 <= words.size(); i += 8) {
            uint64_t word;
            std::memcpy(&word, &words[i], 8);
            const auto found = by_host_.find(word);
            if (found == by_host_.end()) continue;
            word = device_address(found->second);
            std::memcpy(&words[i], &word, 8);
        }
    }

    // The allocation an address lies in or near, and how far from its beginning; null where there is none.
    Allocation* find(uint64_t address, int64_t& offset) {
        const uint64_t index = (address >> kBits) - 1;
        if (index >= allocations_.size()) return nullptr;
        Allocation& a = allocations_[index];
        offset = int64_t(address - device_address(index));
        return &a;
    }

  private:
    static constexpr int kBits = 36;
    uint64_t device_address(uint64_t index) const { return (index + 1) << kBits | (allocations_[index].host & 0xfff); }
    std::deque<Allocation> allocations_;
    std::unordered_map<uint64_t, uint64_t> by_host_;
};

// Who last wrote an element, and who read it since.
struct Cell {
    uint32_t writer = 0, written = 0;  // thread + 1, its time
    uint32_t reader = 0, read = 0;     // the only reader since, or
    int32_t readers = -1;              // all of them: an index into Shadow
    bool atomic = false;               // the last write was one
};

// The cells of one memory. Threads are counted through the launch: block * threads + thread.
class Shadow {
  public:
    enum class Access { read, write, atomic, repeat };  // repeat: a write of what stands there already

    // Calls known(thread, time) for accesses that must come before this one; true where all of them did.
    template <class Known>
    bool touch(uint64_t cell, Access access, uint32_t thread, uint32_t time, uint32_t thread_count,
               const Known& known) {
        if (cells_.size() <= cell) cells_.resize(cell + 1);
        Cell& c = cells_[cell];
        if (access == Access::repeat && c.writer) return true;  // as by all lanes that hold a warp's sum
        const auto before = [&](uint32_t other, uint32_t when) { return other == thread || known(other, when); };
        bool ordered = !c.writer || (access == Access::atomic && c.atomic) || before(c.writer - 1, c.written);
        if (access == Access::read) {
            note_reader(c, thread, time, thread_count);
            return ordered;
        }
        if (c.readers >= 0) {
            const auto& times = many_[c.readers];
            for (uint32_t other = 0; other < times.size(); ++other)
                if (times[other]) ordered &= before(other, times[other]);
        } else if (c.reader) {
            ordered &= before(c.reader - 1, c.read);
        }
        c = {thread + 1, time, 0, 0, -1, access == Access::atomic};
        return ordered;
    }
    bool is_written(uint64_t cell) const { return cell < cells_.size() && cells_[cell].writer; }

  private:
    void note_reader(Cell& c, uint32_t thread, uint32_t time, uint32_t thread_count) {
        if (c.readers >= 0) {
            many_[c.readers][thread] = time;
        } else if (!c.reader || c.reader == thread + 1) {
            c.reader = thread + 1, c.read = time;
        } else {
            c.readers = int32_t(many_.size());
            many_.emplace_back(thread_count);
            many_.back()[c.reader - 1] = c.read;
            many_.back()[thread] = time;
        }
    }
    std::vector<Cell> cells_;
    std::deque<std::vector<uint32_t>> many_;
};

}  // namespace ptx
