// The Python module pybatch._C: addresses and scalars in, no torch types. pybatch/ops.py is its only user.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend.h"
#include "constants.h"
#include "plan.h"
#include "snapshot.h"

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

// A parameter may hold its optimizer, which holds a Snapshot of the parameter: Python's collector must see the way
// back. It may come by while an instance is being made.
void collectable(PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        const auto instance = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
        if (!instance.holder_constructed()) return 0;
        return instance.value_ptr<Snapshot>()->visit(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
        const auto instance = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
        if (instance.holder_constructed()) instance.value_ptr<Snapshot>()->clear();
        return 0;
    };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled core of pybatch; use it through pybatch.ops.";

    py::class_<Table> table(m, "Table");
    table.def(py::init([] { return Table{}; }))
        .def_readwrite("row_count", &Table::row_count)
        .def_readwrite("chunk_count", &Table::chunk_count)
        .def_readwrite("chunk", &Table::chunk)
        .def_readwrite("elements", &Table::elements)
        .def_readwrite("states", &Table::states);
    address(table, "rows", &Table::rows);
    address(table, "chunks", &Table::chunks);
    address(table, "hyper", &Table::hyper);
    address(table, "steps", &Table::steps);
    address(table, "scalars", &Table::scalars);
    address(table, "starts", &Table::starts);
    address(table, "share", &Table::share);
    address(table, "norms", &Table::norms);
    address(table, "carried", &Table::carried);
    address(table, "layers", &Table::layers);
    address(table, "ledger", &Table::ledger);
    address(table, "ring", &Table::ring);
    address(table, "partials", &Table::partials);
    address(table, "ticket", &Table::ticket);
    // For code in C that takes the structs themselves.
    table.def_property_readonly("address", [](const Table& t) { return reinterpret_cast<uintptr_t>(&t); });

    py::class_<Call> call(m, "Call");
    call.def(py::init([] { return Call{}; }))
        .def_readwrite("norm", &Call::norm)
        .def_readwrite("known", &Call::known)
        .def_readwrite("sum", &Call::sum)
        .def_readwrite("noise", &Call::noise)
        .def_readwrite("clip", &Call::clip)
        .def_readwrite("row_norms", &Call::row_norms)
        .def_readwrite("prepare", &Call::prepare)
        .def_readwrite("unscale", &Call::unscale)
        .def_readwrite("follow", &Call::follow)
        .def_readwrite("max_norm", &Call::max_norm)
        .def_readwrite("inverse", &Call::inverse)
        .def_readwrite("examples", &Call::examples)
        .def_readwrite("micro_batches", &Call::micro_batches)
        .def_readwrite("weight", &Call::weight)
        .def_readwrite("seed", &Call::seed)
        .def_readwrite("threads", &Call::threads);
    address(call, "grad_scale", &Call::grad_scale);
    address(call, "found_inf", &Call::found_inf);
    call.def_property_readonly("address", [](const Call& c) { return reinterpret_cast<uintptr_t>(&c); });

    py::class_<Snapshot>(m, "Snapshot", py::custom_type_setup(collectable))
        .def(py::init<const py::list&, const py::list&, const py::list&, const py::dict&>(), py::arg("groups"),
             py::arg("memory"), py::arg("others"), py::arg("state"))
        .def("stands", &Snapshot::stands, py::arg("groups"), py::arg("memory"), py::arg("state"))
        .def("gradients", &Snapshot::gradients, py::arg("params"), py::arg("dtypes"), py::arg("address").noconvert(),
             py::arg("dtype").noconvert())
        .def_static("versions", &Snapshot::versions, py::arg("tensors"), py::arg("version").noconvert());

    m.def("imprints", &imprint::usable);  // whether a Snapshot goes by them
    m.def("imprints_of_gradients", &imprint::gradients_usable);
    m.def("plan", &plan_chunks, py::arg("sizes"), py::arg("chunk"));
    m.def("cpu_width", &cpu_width);
    m.def("cpu_widths", &cpu_widths);
    m.def("set_cpu_width", &set_cpu_width, py::arg("name"));
    m.def("cpu_step", &cpu_step, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_norm", &cpu_norm, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_prepare", &cpu_prepare, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_update", &cpu_update, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_accumulate", &cpu_accumulate, py::call_guard<py::gil_scoped_release>());

    export_constants(m);

#ifdef PB_CUDA
    m.attr("cuda") = true;
    const auto launch = [&m](const char* name, int (*entry)(const Table&, const Call&, void*)) {
        m.def(name, [entry](const Table& t, const Call& c, uintptr_t s) { return entry(t, c, (void*)s); });
    };
    launch("cuda_step", cuda_step);
    launch("cuda_norm", cuda_norm);
    launch("cuda_prepare", cuda_prepare);
    launch("cuda_update", cuda_update);
    launch("cuda_accumulate", cuda_accumulate);
    m.def("cuda_devices", &cuda_devices);
    m.def("cuda_error", [](int code) { return py::make_tuple(cuda_error_name(code), cuda_error_text(code)); });
    m.attr("cuda_architectures") = PB_CUDA_ARCHITECTURES;
    m.attr("kernel_sources") = PB_KERNEL_SOURCES;  // what the CUDA part was compiled from, see CMakeLists.txt
#else
    m.attr("cuda") = false;
    m.attr("cuda_reason") = PB_CUDA_REASON;
#endif
}
