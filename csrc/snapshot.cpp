// Tensors are read through DLPack's C table: no torch headers, no Python object made, nothing copied. torch before 2.10
// has no such table, and a table refuses some tensors: their Python methods are called instead. What has the imprint it
// had when it was read last is not read again.

#include "snapshot.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "dlpack.h"

namespace py = pybind11;

namespace pybatch {
namespace {

// A method without arguments, or an attribute, of torch.Tensor. Where C implements it, C is called: a lookup by name
// costs as much as the answer.
class Asked {
  public:
    Asked(const py::object& type, const char* name)
        : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name))) {
        const py::object found = type.attr(name_);
        if (Py_IS_TYPE(found.ptr(), &PyMethodDescr_Type)) {
            const auto* method = reinterpret_cast<PyMethodDescrObject*>(found.ptr())->d_method;
            if (method->ml_flags == METH_NOARGS) call_ = method->ml_meth;
        } else if (Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) {
            const auto* attribute = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
            get_ = attribute->get;
            closure_ = attribute->closure;
        }
    }

    // The method's result or the attribute's value; `tensor` is a torch.Tensor.
    py::object of(PyObject* tensor) const {
        PyObject* value = call_ ? call_(tensor, nullptr) : get_ ? get_(tensor, closure_) : slow(tensor);
        if (!value) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(value);
    }

  private:
    PyObject* slow(PyObject* tensor) const {
        PyObject* value = PyObject_GetAttr(tensor, name_.ptr());
        if (!value || !PyCallable_Check(value)) return value;
        PyObject* result = PyObject_CallNoArgs(value);
        Py_DECREF(value);
        return result;
    }

    py::object name_;
    PyCFunction call_ = nullptr;
    getter get_ = nullptr;
    void* closure_ = nullptr;
};

struct Torch {
    py::object type = py::module_::import("torch").attr("Tensor");
    py::object parameter = py::module_::import("torch").attr("nn").attr("Parameter");
    Asked grad{type, "grad"}, is_neg{type, "is_neg"}, data_ptr{type, "data_ptr"};
    Asked size{type, "size"}, stride{type, "stride"}, dtype{type, "dtype"}, device{type, "device"};
    Asked version{type, "_version"};
    dlpack::ExchangeTable* table = nullptr;

    Torch() {
        if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
        const py::object capsule = type.attr("__dlpack_c_exchange_api__");
        table = static_cast<dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kTableName));
        if (!table) PyErr_Clear();
        if (table && (table->major != dlpack::kMajor || !table->read)) table = nullptr;
    }
};

const Torch& torch() {
    static const Torch* const made = new Torch;  // never destroyed: Python may be gone by then
    return *made;
}

constexpr size_t kAhead = 8;  // tensors, of which a line of memory each is on its way

bool is_tensor(PyObject* object) {
    const auto type = reinterpret_cast<PyTypeObject*>(torch().type.ptr());
    return PyObject_TypeCheck(object, type);
}

// Whether what is asked of it is answered by torch itself, by no subclass.
bool is_plain(PyObject* tensor) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    return type == torch().parameter.ptr() || type == torch().type.ptr();
}

std::vector<int64_t> numbers(const py::object& tuple) { return tuple.cast<std::vector<int64_t>>(); }

std::vector<py::object> items(const py::list& list) {
    std::vector<py::object> out;
    for (py::handle item : list) out.push_back(py::reinterpret_borrow<py::object>(item));
    return out;
}

bool same_items(const py::list& list, const std::vector<py::object>& kept) {
    if (size_t(list.size()) != kept.size()) return false;
    for (size_t i = 0; i < kept.size(); ++i)
        if (PyList_GET_ITEM(list.ptr(), py::ssize_t(i)) != kept[i].ptr()) return false;
    return true;
}

// Calls owner(own) for every tensor's state and work(value) for every value of it; stops where that says false.
template <class Owner, class Work>
bool each_value(const py::dict& state, const Owner& owner, const Work& work) {
    PyObject *key, *own, *name, *value;
    for (py::ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &own);) {
        owner(own);
        if (!PyDict_Check(own)) {
            if (!work(own)) return false;
            continue;
        }
        for (py::ssize_t j = 0; PyDict_Next(own, &j, &name, &value);)
            if (!work(value)) return false;
    }
    return true;
}

}  // namespace

bool Snapshot::View::same_layout(const View& other) const {
    return dtype == other.dtype && device == other.device && dimensions == other.dimensions &&
           std::equal(sizes, sizes + dimensions, other.sizes) &&
           std::equal(strides, strides + dimensions, other.strides);
}

int64_t Snapshot::View::elements() const {
    int64_t product = 1;
    for (size_t d = 0; d < dimensions; ++d) product *= sizes[d];
    return product;
}

void Snapshot::View::hold() {
    std::vector<int64_t> copy(sizes, sizes + dimensions);
    copy.insert(copy.end(), strides, strides + dimensions);
    held = std::move(copy);
    sizes = held.data();
    strides = sizes + dimensions;
}

bool Snapshot::read(PyObject* tensor, View& view) {
    dlpack::Tensor out;
    if (torch().table && torch().table->read(tensor, &out) == 0) {
        view.data = reinterpret_cast<uintptr_t>(out.data) + out.byte_offset;
        view.dtype = int64_t(out.dtype.code) | int64_t(out.dtype.bits) << 8 | int64_t(out.dtype.lanes) << 16;
        view.device = int64_t(out.device.type) << 32 | uint32_t(out.device.index);
        view.dimensions = size_t(out.dimensions);
        view.sizes = out.sizes;
        view.strides = out.strides;
        return true;
    }
    PyErr_Clear();
    try {
        view.data = torch().data_ptr.of(tensor).cast<uintptr_t>();
        view.held = numbers(torch().size.of(tensor));
        view.dimensions = view.held.size();
        for (int64_t stride : numbers(torch().stride.of(tensor))) view.held.push_back(stride);
        view.sizes = view.held.data();
        view.strides = view.sizes + view.dimensions;
        view.dtype = -int64_t(reinterpret_cast<uintptr_t>(torch().dtype.of(tensor).ptr()));
        view.device = -int64_t(py::hash(torch().device.of(tensor))) | 1;
        return true;
    } catch (py::error_already_set&) {  // without memory: sparse, fake, a wrapper
        return false;
    }
}

Snapshot::Seen Snapshot::seen(PyObject* tensor, uintptr_t data) {
    if (!imprint::usable()) return {0, data, {}};
    return {imprint::of(tensor).all, data, imprint::place(tensor)};
}

Snapshot::Snapshot(const py::list& groups, const py::list& memory, const py::list& others, const py::dict& state)
    : others_(items(others)), views_(memory.size()), gradients_(memory.size()) {
    for (py::handle group : groups) members_.push_back(items(py::reinterpret_borrow<py::list>(group)));
    for (size_t i = 0; i < views_.size(); ++i) {
        PyObject* const tensor = PyList_GET_ITEM(memory.ptr(), py::ssize_t(i));
        if (!read(tensor, views_[i])) throw py::value_error("a tensor of the table has no memory");
        views_[i].hold();
        memory_.push_back(seen(tensor, views_[i].data));
    }
    each_value(
        state,
        [&](PyObject* own) {
            const bool dict = PyDict_Check(own);
            owners_.push_back(
                {reinterpret_cast<const char*>(own),
                 dict ? reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(own)->ma_keys) : nullptr});
        },
        [&](PyObject* value) {
            View view;
            const bool there = is_tensor(value) && read(value, view) && view.data;
            if (there) view.hold();
            states_.push_back(there ? seen(value, view.data) : Seen());
            state_views_.push_back(there ? std::move(view) : View());
            values_.push_back(py::reinterpret_borrow<py::object>(value));
            return true;
        });
}

int Snapshot::visit(visitproc visit, void* arg) const {
    for (const auto* list : {&others_, &values_})
        for (const py::object& item : *list) Py_VISIT(item.ptr());
    for (const auto& group : members_)
        for (const py::object& item : group) Py_VISIT(item.ptr());
    return 0;
}

void Snapshot::clear() {
    // Moved out first: giving an object up may run Python, which must find this one whole.
    const auto members = std::move(members_);
    const auto others = std::move(others_), values = std::move(values_);
    members_.clear();
    others_.clear();
    values_.clear();
    views_.clear();
    state_views_.clear();
    memory_.clear();
    states_.clear();
    owners_.clear();
    gradients_.clear();
}

bool Snapshot::stands(const py::list& groups, const py::list& memory, const py::dict& state) {
    if (size_t(groups.size()) != members_.size() || size_t(memory.size()) != views_.size()) return false;
    for (size_t i = 0; i < members_.size(); ++i)
        if (!same_items(py::reinterpret_borrow<py::list>(groups[i]), members_[i])) return false;
    for (size_t i = 0; i < views_.size(); ++i)
        if (!same_memory(PyList_GET_ITEM(memory.ptr(), py::ssize_t(i)), i)) return false;
    for (const py::object& other : others_)
        if (!torch().grad.of(other.ptr()).is_none()) return false;
    return same_state(state);
}

bool Snapshot::same_memory(PyObject* tensor, size_t i) {
    if (i + kAhead < memory_.size()) memory_[i + kAhead].place.prefetch();
    Seen& last = memory_[i];
    if (last.imprint && last.imprint == imprint::of(tensor).all) return true;
    View view;
    if (!read(tensor, view) || view.data != views_[i].data || !view.same_layout(views_[i])) return false;
    last = seen(tensor, view.data);
    return true;
}

bool Snapshot::same_state(const py::dict& state) {
    size_t i = 0, of = 0;
    const bool same = each_value(
        state,
        [&](PyObject*) {
            if (of + kAhead < owners_.size()) {
                __builtin_prefetch(owners_[of + kAhead].dict);
                for (int line = 0; line < 3; ++line) __builtin_prefetch(owners_[of + kAhead].items + 64 * line);
            }
            ++of;
        },
        [&](PyObject* value) {
            if (i == values_.size() || value != values_[i].ptr()) return false;
            if (i + kAhead < states_.size()) states_[i + kAhead].place.prefetch();
            const View& before = state_views_[i];
            Seen& last = states_[i++];
            if (!last.data || (last.imprint && last.imprint == imprint::of(value).all)) return true;
            View view;
            if (!read(value, view) || view.data != last.data || !view.same_layout(before)) return false;
            last = seen(value, view.data);
            return true;
        });
    return same && i == values_.size();
}

bool Snapshot::fits(const View& view, const View& own) {
    if (view.device != own.device || view.dimensions != own.dimensions ||
        !std::equal(view.sizes, view.sizes + view.dimensions, own.sizes))
        return false;
    const int64_t elements = own.elements();
    for (size_t d = 0; elements && d < own.dimensions; ++d)
        if (own.sizes[d] != 1 && view.strides[d] != own.strides[d]) return false;
    return view.data != 0 || elements == 0;
}

std::pair<int64_t, int64_t> Snapshot::gradients(const py::list& params, const py::list& dtypes, Numbers address,
                                                Numbers dtype) {
    View view;
    std::vector<int64_t> codes;
    for (py::handle sample : dtypes) {
        if (!read(sample.ptr(), view)) throw py::type_error("a sample of a dtype has no memory");
        codes.push_back(view.dtype);
    }
    if (size_t(params.size()) != views_.size() || size_t(address.size()) != views_.size() ||
        size_t(dtype.size()) != views_.size())
        throw py::value_error("params, address and dtype need one item for each tensor of the table");
    int64_t bad = -1, count = 0;
    int64_t *const addresses = address.mutable_data(), *const types = dtype.mutable_data();
    const bool unasked = imprint::gradients_usable();
    for (size_t i = 0; i < views_.size(); ++i) {
        if (i + kAhead < views_.size()) {
            memory_[i + kAhead].place.prefetch_gradient();
            gradients_[i + kAhead].place.prefetch();
        }
        PyObject* const param = PyList_GET_ITEM(params.ptr(), py::ssize_t(i));
        SeenGradient& last = gradients_[i];
        if (unasked && last.imprint.all && is_plain(param) && imprint::of_gradient(param).all == last.imprint.all) {
            ++count;
            addresses[i] = last.address;
            types[i] = last.dtype;
            continue;
        }
        const py::object grad = torch().grad.of(param);
        addresses[i] = 0;
        if (grad.is_none()) continue;
        ++count;
        const auto now = imprint::usable() ? imprint::of(grad.ptr()) : imprint::Imprint();
        if (!now.all || now.all != last.imprint.all) {
            const bool readable = read(grad.ptr(), view) && fits(view, views_[i]);
            const auto code = std::find(codes.begin(), codes.end(), view.dtype);
            const bool known = now.kind && now.kind == last.imprint.kind;  // then not negated either
            if (!readable || code == codes.end() || (!known && torch().is_neg.of(grad.ptr()).ptr() != Py_False)) {
                if (bad < 0) bad = int64_t(i);
                continue;
            }
            last = {now, views_[i].elements() ? int64_t(view.data) : 1, code - codes.begin(),
                    imprint::usable() ? imprint::place(grad.ptr()) : imprint::Place()};
        }
        addresses[i] = last.address;
        types[i] = last.dtype;
    }
    return {bad, count};
}

std::vector<int64_t> Snapshot::versions(const py::list& tensors, Numbers version) {
    if (tensors.size() != size_t(version.size())) throw py::value_error("version needs one item a tensor");
    std::vector<int64_t> changed;
    for (py::ssize_t i = 0; i < version.size(); ++i) {
        const auto now = torch().version.of(PyList_GET_ITEM(tensors.ptr(), i)).cast<int64_t>();
        if (now != version.data()[i]) changed.push_back(i);
        version.mutable_data()[i] = now;
    }
    return changed;
}

}  // namespace pybatch
