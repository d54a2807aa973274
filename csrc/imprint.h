// A tensor's memory and layout as one number: of the words in which torch itself keeps them, some of which are
// addresses. Equal numbers mean that nothing moved. A look at the words takes a few nanoseconds, a question to torch
// fifty.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pybatch::imprint {

// Where torch keeps what it knows of a tensor. 0: this torch is laid out otherwise, and imprints say nothing.
struct Place {
    const char *object = nullptr, *about = nullptr, *storage = nullptr, *autograd = nullptr;

    // All of it, some tensors before it is read: most of the time goes into waiting for memory.
    void prefetch() const {
        __builtin_prefetch(object);
        for (int line = 0; line < 3; ++line) __builtin_prefetch(about + 64 * line);
        __builtin_prefetch(storage + 16);
        __builtin_prefetch(storage + 55);  // the last byte that is read, often of the next line
    }

    // As much of it as leads to the gradient.
    void prefetch_gradient() const {
        __builtin_prefetch(object);
        __builtin_prefetch(about);
        __builtin_prefetch(autograd);
    }
};

// Whether imprints can be trusted: tried once, on tensors that are changed in every way that matters.
bool usable();

// Of a tensor that has memory; only where usable().
Place place(PyObject* tensor);

// 0 where there is none; only where usable(). `kind` is of what remains equal where only the memory is another: dtype,
// device, whether negated.
struct Imprint {
    uint64_t all = 0, kind = 0;
};
Imprint of(PyObject* tensor);

// Of the gradient that torch keeps for a tensor, which then needs no Python object; 0 where there is none with memory.
// Only where gradients_usable(), and of no subclass of Tensor that has a gradient of its own.
bool gradients_usable();
Imprint of_gradient(PyObject* tensor);

}  // namespace pybatch::imprint
