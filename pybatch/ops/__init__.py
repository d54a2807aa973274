"""The fused passes over a list of tensors: tables on the device, and the backends that run over them.

The only importer of the compiled module and of `pybatch.kernels`. All three backends (C++ on the CPU, CUDA C++, Triton)
work on the same plain tensors; what their columns mean is defined once, in kernels/table.h.
"""

from pybatch.ops.backends import (
    BACKENDS,
    Backend,
    CppBackend,
    CudaBackend,
    TritonBackend,
    choose_backend,
    example_kernels,
    on_device,
    why_not,
)
from pybatch.ops.compiled import (
    DTYPES,
    HYPER_COLUMNS,
    LAYER_SIZE,
    LAYER_SUMS,
    RULES,
    STATE_BLOCK,
    STATE_TYPES,
    STORAGES,
    Build,
    Call,
    Reduce,
    Snapshot,
    UpdateRule,
    build,
)
from pybatch.ops.ledger import Ledger
from pybatch.ops.narrow import from_codes, scale_count, to_codes
from pybatch.ops.pages import empty_like, zeros_like
from pybatch.ops.tensors import Entry, TensorList, refuse_capture

__all__ = [
    "BACKENDS",
    "DTYPES",
    "HYPER_COLUMNS",
    "LAYER_SIZE",
    "LAYER_SUMS",
    "RULES",
    "STATE_BLOCK",
    "STATE_TYPES",
    "STORAGES",
    "Backend",
    "Build",
    "Call",
    "CppBackend",
    "CudaBackend",
    "Entry",
    "Ledger",
    "Reduce",
    "Snapshot",
    "TensorList",
    "TritonBackend",
    "UpdateRule",
    "build",
    "choose_backend",
    "empty_like",
    "example_kernels",
    "from_codes",
    "on_device",
    "refuse_capture",
    "scale_count",
    "to_codes",
    "why_not",
    "zeros_like",
]
