#include "imprint.h"

#include <pybind11/eval.h>

#include <utility>

namespace py = pybind11;

namespace pybatch::imprint {
namespace {

using Word = uint64_t;

// In words of 8 bytes: a Python object holds torch's tensor after Python's own two words; that holds its storage after
// two of its own, then what autograd keeps and the like, then sizes, strides and offset, and at last dtype, device and
// what kind of tensor it is; a storage holds its memory after two words. Where words end that matter is what usable()
// tries.
constexpr int kFirst = 2, kAutograd = 3, kShape = 7, kKind = 20, kLast = 22, kStorageLast = 7;
constexpr int kGradient = 5;         // of what autograd keeps
constexpr Word kMostDimensions = 5;  // their number is the first word of the shape; of more, sizes lie elsewhere

const Word* at(Word address) { return reinterpret_cast<const Word*>(address); }
const Word* follow(const Word* words) { return at(words[kFirst]); }
const Word* about(PyObject* tensor) { return follow(reinterpret_cast<const Word*>(tensor)); }

// Of the word at this place: odd, and without a pattern that changes of neighbours could follow (splitmix64's mixing).
constexpr Word factor(int place) {
    Word x = Word(place + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (x ^ (x >> 31)) | 1u;
}

// A change of one word always shows, of several by all odds. The factors are in the code: a word costs three
// instructions, and it is the instructions that a look at four thousand tensors waits for.
template <int kFactor, int... Place>
Word sum_of(const Word* words, std::integer_sequence<int, Place...>) {
    return ((words[Place] * std::integral_constant<Word, factor(kFactor + Place)>::value) + ...);
}
template <int kFrom, int kTo, int kFactor>
Word mixed(const Word* words) {
    return sum_of<kFactor + kFrom>(words + kFrom, std::make_integer_sequence<int, kTo - kFrom>());
}

Imprint imprint_of(const Word* words) {
    const Word* storage = follow(words);
    if (!storage || words[kShape] > kMostDimensions) return {};
    // The address of the storage itself is left out: it says nothing that its memory and size do not.
    const Word kind = mixed<kKind, kLast, 0>(words);
    const Word all = kind + mixed<kShape, kKind, 0>(words) + mixed<kFirst, kStorageLast, kLast>(storage);
    return {all ? all : 1, kind ? kind : 1};
}

// Each is done to a tensor of shape (2, 3) named t, in eight words of memory.
constexpr const char* kChanges[] = {
    "t.data = torch.ones(2, 3, device='cpu')",
    "t.data = t.data.to(torch.float64)",
    "t.data = t.data.view(torch.int32)",
    "t.data = torch._neg_view(t.data)",
    "t.t_()",
    "t.resize_(1, 3)",
    "t.resize_(6)",
    "t.set_(t.untyped_storage(), 1, (2, 3), (3, 1))",
    "t.untyped_storage().resize_(0)",
    "t.untyped_storage().resize_(1 << 20)",
};

bool tried() {
    const py::object torch = py::module_::import("torch"), ones = torch.attr("ones");
    const auto number = [](const py::object& of) { return of.attr("_cdata").cast<Word>(); };
    py::dict names;
    names["torch"] = torch;
    for (const char* change : kChanges) {
        const py::object t =
            py::eval("torch.ones(8, device='cpu', dtype=torch.float32)[:6].view(2, 3).detach()", names);
        names["t"] = t;
        const py::object storage = t.attr("untyped_storage")();
        if (Word(reinterpret_cast<uintptr_t>(about(t.ptr()))) != number(t)) return false;
        if (Word(reinterpret_cast<uintptr_t>(follow(about(t.ptr())))) != number(storage)) return false;
        const Imprint before = of(t.ptr());
        t.attr("add_")(1);
        if (of(t.ptr()).all != before.all) return false;
        py::exec(change, names);
        if (of(t.ptr()).all == before.all) return false;
    }
    const auto kind = [&](const char* made) { return of(py::eval(made, names).ptr()).kind; };
    constexpr const char *plain = "torch.ones(2, 3, device='cpu')", *negated = "torch._neg_view(torch.ones(2, 3))";
    return kind(plain) == kind("torch.ones(4, device='cpu')") && kind(plain) != kind(negated);
}

// Where torch is asked for the gradient, the answer is the tensor whose words are looked at, through every change.
bool gradients_tried() {
    py::dict names;
    names["torch"] = py::module_::import("torch");
    const auto run = [&](const char* line) { py::exec(line, names); };
    run("p = torch.nn.Parameter(torch.ones(2, 3, device='cpu'))");
    run("view = torch.ones(8, device='cpu')[2:].view(2, 3).requires_grad_()");
    run("plain = torch.ones(2, 3, device='cpu')");
    for (const char* name : {"p", "view", "plain"}) {
        const py::object tensor = names[name];
        if (of_gradient(tensor.ptr()).all) return false;
        for (const char* made : {"torch.ones(2, 3, device='cpu')", "torch.zeros(6, device='cpu').view(2, 3)"}) {
            const py::object grad = py::eval(made, names);
            tensor.attr("grad") = grad;
            if (at(at(about(tensor.ptr())[kAutograd])[kGradient]) != about(grad.ptr())) return false;
            if (of_gradient(tensor.ptr()).all != of(grad.ptr()).all) return false;
        }
        tensor.attr("grad") = py::none();
        if (of_gradient(tensor.ptr()).all) return false;
    }
    return true;
}

bool holds(bool (*test)()) {
    try {
        return test();
    } catch (py::error_already_set&) {  // some mode is in force, or names have changed
        return false;
    }
}

}  // namespace

// The answers are guarded by Python's lock, which a static's own guard would wait for in vain.

bool usable() {
    static int answer = -1;
    if (answer < 0) answer = holds(tried);
    return answer == 1;
}

bool gradients_usable() {
    static int answer = -1;
    if (answer < 0) answer = usable() && holds(gradients_tried);
    return answer == 1;
}

Place place(PyObject* tensor) {
    const Word* words = about(tensor);
    return {reinterpret_cast<const char*>(tensor), reinterpret_cast<const char*>(words),
            reinterpret_cast<const char*>(follow(words)), reinterpret_cast<const char*>(words[kAutograd])};
}

Imprint of(PyObject* tensor) { return imprint_of(about(tensor)); }

Imprint of_gradient(PyObject* tensor) {
    const Word* kept = at(about(tensor)[kAutograd]);
    const Word* gradient = kept ? at(kept[kGradient]) : nullptr;
    return gradient ? imprint_of(gradient) : Imprint();
}

}  // namespace pybatch::imprint
