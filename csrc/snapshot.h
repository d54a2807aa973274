// What a table of tensors was built from, and whether all of it still stands: looked at in every step, so in one call.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "imprint.h"

namespace pybatch {

class Snapshot {
  public:
    using Numbers = pybind11::array_t<int64_t, pybind11::array::c_style>;

    // groups: [[parameter]]; memory: the tensors in the table; others: parameters that are not in it;
    // state: {parameter: {name: value}}, all as they are now.
    Snapshot(const pybind11::list& groups, const pybind11::list& memory, const pybind11::list& others,
             const pybind11::dict& state);

    // Whether nothing was replaced, resized, moved or cast since, and none of the others has got a gradient.
    bool stands(const pybind11::list& groups, const pybind11::list& memory, const pybind11::dict& state);

    // Reads .grad of `params`, one per tensor of the table. Writes its address (0: no gradient, 1: one without
    // elements) and dtype (a position in `dtypes`). Returns the index of the first that a pass can't read as it is
    // (another layout, shape, device or dtype, negated, without memory), or -1; and how many there are.
    std::pair<int64_t, int64_t> gradients(const pybind11::list& params, const pybind11::list& dtypes, Numbers address,
                                          Numbers dtype);

    // Version counters of tensors, which torch counts up with every change in place. Writes them and returns the
    // indices of those that differ from what stood there.
    static std::vector<int64_t> versions(const pybind11::list& tensors, Numbers version);

    // For Python's collector of cycles: every object kept here.
    int visit(visitproc visit, void* arg) const;
    void clear();

  private:
    struct View {  // memory and layout as read; equal numbers mean equal dtypes and devices
        uintptr_t data = 0;
        int64_t dtype = 0, device = 0;
        size_t dimensions = 0;
        const int64_t *sizes = nullptr, *strides = nullptr;  // the tensor's own, or `held`
        std::vector<int64_t> held;

        bool same_layout(const View& other) const;
        int64_t elements() const;
        void hold();  // keeps a copy of the layout
    };

    // A tensor when it was read last: where its imprint is the same, so is all that was read then.
    struct Seen {
        uint64_t imprint = 0;  // 0: of no use
        uintptr_t data = 0;    // 0: not a tensor with memory
        imprint::Place place;
    };
    struct SeenGradient {
        imprint::Imprint imprint;
        int64_t address = 0, dtype = 0;
        imprint::Place place;
    };
    struct OwnState {  // of a parameter: the dictionary and where its items are, which are only fetched ahead
        const char *dict, *items;
    };

    static bool read(PyObject* tensor, View& view);
    static Seen seen(PyObject* tensor, uintptr_t data);
    bool same_memory(PyObject* tensor, size_t i);
    bool same_state(const pybind11::dict& state);
    // Whether a pass can read a gradient as it is; `own` is its parameter.
    static bool fits(const View& gradient, const View& own);

    std::vector<std::vector<pybind11::object>> members_;  // kept, so that no address of an object is given out again
    std::vector<pybind11::object> others_, values_;
    std::vector<View> views_, state_views_;
    std::vector<Seen> memory_, states_;  // of views_, of values_
    std::vector<OwnState> owners_;
    std::vector<SeenGradient> gradients_;
};

}  // namespace pybatch
