"""One verdict on every backend for gradients at the ends of fp32; for Triton see test_triton.py, for PTX tests/ptx."""

import pytest
import torch
from cases import extremes, host_cuda, lists

from pybatch import _C, ops

COUNTS = lists.sizes(host_cuda.HostCuda.chunk)


def make(backend):
    return lists.Setup(lists.draw(COUNTS, seed=5), "SgdMomentum", backend=backend)


@pytest.mark.parametrize("accumulated", [False, True], ids=["gradient", "sum"])
@pytest.mark.parametrize("name", extremes.NAMES)
def test_the_core_and_cuda_give_the_verdict_of_float64(library, name, accumulated):
    for backend in (ops.CppBackend(), host_cuda.HostCuda(library)):
        extremes.check(make(backend), name, accumulated=accumulated)


@pytest.mark.isa
@pytest.mark.parametrize("name", extremes.NAMES)
def test_every_vector_width_gives_it(name):
    before = _C.cpu_width()
    try:
        for width in _C.cpu_widths():
            _C.set_cpu_width(width)
            extremes.check(make(ops.CppBackend()), name)
    finally:
        _C.set_cpu_width(before)


@pytest.mark.parametrize("name", ["inf", "nan", "1e20", "1e-20 everywhere", "1e20 everywhere"])
def test_gradients_of_16_bits_give_it_too(library, name):
    for backend in (ops.CppBackend(), host_cuda.HostCuda(library)):
        extremes.check(make(backend), name, torch.bfloat16)
