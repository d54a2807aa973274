// Happens-before between the threads of a launch, as vector clocks (Lamport 1978; Mattern 1989) under the rules of the
// PTX memory model: barriers order a block's threads; between blocks only fence -> atomic, seen by atomic -> fence,
// does, and a barrier may stand between a fence and an atomic (causality is cumulative). Atomics alone order nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptx {

// For every thread the time up to which its accesses are known; threads of a block are kept together.
class Clock {
  public:
    uint32_t at(uint32_t block, uint32_t thread) const {
        return block < of_.size() && !of_[block].empty() ? of_[block][thread] : 0;
    }
    void raise(uint32_t block, uint32_t thread, uint32_t time, uint32_t threads) {
        auto& times = row(block, threads);
        times[thread] = std::max(times[thread], time);
    }
    void join(const Clock& other) {
        for (uint32_t block = 0; block < other.of_.size(); ++block) {
            if (other.of_[block].empty()) continue;
            auto& times = row(block, uint32_t(other.of_[block].size()));
            for (size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], other.of_[block][i]);
        }
    }
    bool empty() const { return of_.empty(); }

  private:
    std::vector<uint32_t>& row(uint32_t block, uint32_t threads) {
        if (of_.size() <= block) of_.resize(block + 1);
        if (of_[block].empty()) of_[block].resize(threads);
        return of_[block];
    }
    std::vector<std::vector<uint32_t>> of_;
};

// One thread between two barriers.
struct ThreadClock {
    uint32_t time = 1;    // grows at every fence and barrier
    uint32_t fenced = 0;  // its time at the last fence since the last barrier; 0: none
    Clock known;          // acquired by itself since the last barrier
    Clock seen;           // read by atomics, not yet fenced
};

// What all threads of a block share since the last barrier.
struct BlockClock {
    Clock known, released, seen;

    void fence(ThreadClock& thread) const {
        thread.known.join(thread.seen);
        thread.known.join(seen);
        thread.fenced = thread.time++;
    }

    // `location`: what atomics have released there.
    void atomic(ThreadClock& thread, Clock& location, uint32_t block, uint32_t index, uint32_t threads) const {
        thread.seen.join(location);
        location.join(released);
        if (!thread.fenced) return;
        location.join(known);
        location.join(thread.known);
        location.raise(block, index, thread.fenced, threads);
    }

    void barrier(std::vector<ThreadClock*>& threads, uint32_t block) {
        const auto count = uint32_t(threads.size());
        const bool fenced = std::any_of(threads.begin(), threads.end(), [](const auto* t) { return t->fenced; });
        if (fenced) released.join(known);
        for (uint32_t i = 0; i < count; ++i) {
            ThreadClock& thread = *threads[i];
            if (thread.fenced) {
                released.join(thread.known);
                released.raise(block, i, thread.fenced, count);
            }
            seen.join(thread.seen);
        }
        for (uint32_t i = 0; i < count; ++i) {
            ThreadClock& thread = *threads[i];
            known.join(thread.known);
            known.raise(block, i, thread.time, count);
            thread = {thread.time + 1, 0, {}, {}};
        }
    }

    bool knows(const ThreadClock& own, uint32_t block, uint32_t thread, uint32_t time) const {
        return known.at(block, thread) >= time || own.known.at(block, thread) >= time;
    }
};

}  // namespace ptx
