"""What Triton makes of its kernels for sm_90, on the emulator against the C++ core."""

import pytest
import torch
from cases import lists, ptx_triton
from cases.agreement import assert_same

from pybatch import ops

CHUNK = ptx_triton.TritonPtx.chunk
COUNTS = [5, 0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 33]


def make(backend, storage):
    dtype = getattr(torch, storage.split("_")[0])
    layers = torch.zeros(len(COUNTS), ops.LAYER_SIZE, dtype=torch.float64)
    made = lists.Setup(lists.draw(COUNTS, dtype, seed=5), "AdamW", storage, layers=layers, backend=backend)
    backend.setup = made
    return made


@pytest.mark.slow(seconds=15)
def test_device_code_does_what_the_core_does(library, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    storage = "bfloat16_remainder"
    setups = [make(backend, storage) for backend in (ops.CppBackend(), ptx_triton.TritonPtx(library))]
    for made in setups:
        made.step(lists.draw(COUNTS, seed=1), norm=True, clip=True, max_norm=3.0)
        for i in range(2):
            made.accumulate(lists.draw(COUNTS, seed=2 + i), 4.0, first=not i)
        how = {"noise": True, "inverse": 0.5, "examples": 8.0, "micro_batches": 2.0}
        made.step([None] * len(COUNTS), sum=True, known=True, **how)
    assert not setups[1].backend.faults
    assert_same(*setups, storage)
