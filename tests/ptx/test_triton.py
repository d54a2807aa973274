"""What Triton makes of its kernels for sm_90, on the emulator against the C++ core."""

import pytest
import torch
from cases import lists, ptx_triton
from cases.agreement import assert_same, assert_same_but_for_codes

from pybatch import ops

CHUNK = ptx_triton.TritonPtx.chunk
COUNTS = [5, 0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 33]


def make(backend, storage):
    dtype = getattr(torch, storage.split("_")[0])
    layers = torch.zeros(len(COUNTS), ops.LAYER_SIZE, dtype=torch.float64)
    made = lists.Setup(lists.draw(COUNTS, dtype, seed=5), "AdamW", storage, layers=layers, backend=backend)
    backend.setup = made
    return made


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


def test_states_in_eight_bits(library, monkeypatch, tmp_path):
    """Scales are read by every thread of a block and written by one."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    class Wide(ptx_triton.TritonPtx):
        chunk = 4 * ops.STATE_BLOCK

    setups = []
    for backend in (ops.CppBackend(), Wide(library)):
        params = lists.draw([Wide.chunk + 300, 1], seed=5)
        backend.setup = made = lists.Setup(params, "SgdMomentum", backend=backend, state_type="8bit")
        for seed in (1, 2):
            made.step(lists.draw([Wide.chunk + 300, 1], seed=seed), norm=True)
        setups.append(made)
    assert not setups[1].backend.faults
    assert_same_but_for_codes(*setups)
