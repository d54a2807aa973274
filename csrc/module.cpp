// The Python module pybatch._C: addresses and scalars in, no torch types. pybatch/ops.py is its only user.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend.h"
#include "plan.h"
#include "rules.h"

namespace py = pybind11;
using namespace pybatch;

namespace {

using Sizes = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> plan_chunks(const Sizes& sizes, int64_t chunk) {
    const auto pairs = plan(sizes.data(), sizes.size(), chunk);
    py::array_t<int64_t> out({py::ssize_t(pairs.size() / 2), py::ssize_t(2)});
    std::copy(pairs.begin(), pairs.end(), out.mutable_data());
    return out;
}

template <class Owner, class T>
void address(py::class_<Owner>& type, const char* name, T* Owner::* member) {
    type.def_property(
        name, [member](const Owner& owner) { return reinterpret_cast<uintptr_t>(owner.*member); },
        [member](Owner& owner, uintptr_t value) { owner.*member = reinterpret_cast<T*>(value); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled core of pybatch; use it through pybatch.ops.";

    py::class_<Table> table(m, "Table");
    table.def(py::init([] { return Table{}; }))
        .def_readwrite("row_count", &Table::row_count)
        .def_readwrite("chunk_count", &Table::chunk_count)
        .def_readwrite("chunk", &Table::chunk)
        .def_readwrite("elements", &Table::elements);
    address(table, "rows", &Table::rows);
    address(table, "chunks", &Table::chunks);
    address(table, "hyper", &Table::hyper);
    address(table, "steps", &Table::steps);
    address(table, "ledger", &Table::ledger);
    address(table, "ring", &Table::ring);
    address(table, "partials", &Table::partials);
    address(table, "ticket", &Table::ticket);

    py::class_<Call> call(m, "Call");
    call.def(py::init([] { return Call{}; }))
        .def_readwrite("norm", &Call::norm)
        .def_readwrite("known", &Call::known)
        .def_readwrite("sum", &Call::sum)
        .def_readwrite("noise", &Call::noise)
        .def_readwrite("clip", &Call::clip)
        .def_readwrite("max_norm", &Call::max_norm)
        .def_readwrite("inverse", &Call::inverse)
        .def_readwrite("examples", &Call::examples)
        .def_readwrite("micro_batches", &Call::micro_batches)
        .def_readwrite("weight", &Call::weight)
        .def_readwrite("threads", &Call::threads);
    address(call, "grad_scale", &Call::grad_scale);
    address(call, "found_inf", &Call::found_inf);

    m.def("plan", &plan_chunks, py::arg("sizes"), py::arg("chunk"));
    m.def("cpu_width", &cpu_width);
    m.def("cpu_widths", &cpu_widths);
    m.def("set_cpu_width", &set_cpu_width, py::arg("name"));
    m.def("cpu_step", &cpu_step, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_accumulate", &cpu_accumulate, py::call_guard<py::gil_scoped_release>());

    py::dict rules, columns, ledger, dtypes;
#define PB_NUMBER(NUMBER, RULE) rules[#RULE] = py::make_tuple(NUMBER, PB_ISA::RULE::states);
    PB_FOR_EACH_RULE(PB_NUMBER)
#undef PB_NUMBER
    for (auto [name, value] : {std::pair{"param", kParam},
                               {"grad", kGrad},
                               {"sum", kSum},
                               {"state0", kState0},
                               {"numel", kNumel},
                               {"code", kCode},
                               {"group", kGroup},
                               {"fresh", kFresh}})
        columns[name] = int(value);
    for (auto [name, value] : {std::pair{"sum_sq", kSumSq},
                               {"bad", kBad},
                               {"micro_sq", kMicroSq},
                               {"norm", kNorm},
                               {"clip", kClip},
                               {"skipped", kSkipped},
                               {"pairs", kPairs},
                               {"small_sum", kSmallSum},
                               {"large_sum", kLargeSum},
                               {"ring_steps", kRingSteps},
                               {"ring_length", kRingLength}})
        ledger[name] = int(value);
    dtypes["float32"] = int(kFloat32);
    dtypes["bfloat16"] = int(kBFloat16);
#ifdef __FLT16_MAX__
    dtypes["float16"] = int(kFloat16);
#endif
    m.attr("rules") = rules;  // name: (number, states)
    m.attr("columns") = columns;
    m.attr("column_count") = int(kColumns);
    m.attr("ledger") = ledger;
    m.attr("ledger_size") = int(kLedgerSize);
    m.attr("ring_rows") = kRingRows;
    m.attr("dtypes") = dtypes;
    m.attr("dtype_count") = int(kDtypes);
    m.attr("hyper_columns") = int(PB_ISA::kHyperColumns);

#ifdef PB_CUDA
    m.attr("cuda") = true;
    m.def("cuda_step", [](const Table& t, const Call& c, uintptr_t s) { return cuda_step(t, c, (void*)s); });
    m.def("cuda_accumulate",
          [](const Table& t, const Call& c, uintptr_t s) { return cuda_accumulate(t, c, (void*)s); });
    m.def("cuda_devices", &cuda_devices);
    m.def("cuda_error", [](int code) { return py::make_tuple(cuda_error_name(code), cuda_error_text(code)); });
    m.attr("cuda_architectures") = PB_CUDA_ARCHITECTURES;
#else
    m.attr("cuda") = false;
    m.attr("cuda_reason") = PB_CUDA_REASON;
#endif
}
