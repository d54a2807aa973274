"""The CUDA kernels compiled for the host (tests/kernels/cuda_on_host), as a backend of CPU tensors."""

import ctypes
import os
import shlex

from cases.compilers import compile_once
from cases.paths import ROOT

from pybatch import ops
from pybatch.base.errors import DeviceError

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]


def compile_kernels(source=ROOT / "tests/kernels/cuda_on_host/kernels.cpp"):
    """Build the kernels, or another source; returns the library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [ROOT / name for name in ("tests/kernels/cuda_on_host", "kernels", "csrc")]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *WARNINGS]
    return ctypes.CDLL(str(compile_once(compiler, options, [source], ".so", includes)))


class HostCuda(ops.CudaBackend):
    """CUDA blocks one after another; `backwards`: blocks, warps and lanes from the last to the first."""

    chunk = 2048  # two vectors a thread

    def __init__(self, library, backwards=False):
        self.library, self.backwards, self.launches = library, backwards, 0

    def _run(self, entry, tensors, call):
        count = ctypes.c_uint(0)
        table, scalars = ctypes.c_void_p(tensors.table.address), ctypes.c_void_p(call.address)
        run = getattr(self.library, f"host_{entry}")
        error = run(table, scalars, ctypes.c_bool(self.backwards), ctypes.byref(count))
        if error:
            raise DeviceError(f"{entry}: error {error}: the threads of a block parted at a barrier.")
        self.launches = count.value
