"""The C++ core divides its passes between threads, whatever else runs beside these tests: one would show less."""

import pytest
import torch
from cases import host_cuda


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library():
    """The CUDA kernels as the host compiler makes them."""
    return host_cuda.compile_kernels()
