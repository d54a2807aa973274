// What went wrong, once per kind and place.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace ptx {

class Faults {
  public:
    void add(const std::string& kind, int line, const std::string& what) {
        if (found_.size() < kMost || found_.count({kind, line}))
            ++found_.try_emplace({kind, line}, what, 0).first->second.second;
    }
    bool empty() const { return found_.empty(); }
    void clear() { found_.clear(); }

    // A line each: "kind, PTX line, times: what".
    std::string text() const {
        std::string lines;
        for (const auto& [place, fault] : found_)
            lines += place.first + ", PTX line " + std::to_string(place.second) + ", " + std::to_string(fault.second) +
                     " times: " + fault.first + "\n";
        return lines;
    }

  private:
    static constexpr size_t kMost = 50;
    std::map<std::pair<std::string, int>, std::pair<std::string, uint64_t>> found_;
};

}  // namespace ptx
