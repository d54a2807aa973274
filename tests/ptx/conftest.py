"""The PTX that nvcc emits and the emulator that runs it, built once."""

import pytest
from cases import ptx


@pytest.fixture(scope="session")
def library():
    if not ptx.nvcc():
        pytest.skip("nvcc was not found: put the CUDA toolkit's bin directory on PATH or set CUDACXX")
    return ptx.compile_emulator()


@pytest.fixture(scope="session")
def programs(library, tmp_path_factory):
    """Of the installed core where that holds it: what is shipped."""
    return ptx.installed_kernels() or ptx.compile_kernels(tmp_path_factory.mktemp("ptx"))
