"""The CUDA kernels without a GPU: compiled for the host, where they must give what the CPU core gives.

What this can't show is a race between blocks, and speed; tests/optim/test_gpu.py runs on a device.
"""

import ctypes
import math
import subprocess

import pytest
import torch
from cases import host_cuda, lists
from cases.agreement import assert_same, assert_same_but_for_codes
from cases.problem import same_bits

from pybatch import _C, ops

CHUNK = host_cuda.HostCuda.chunk
COUNTS = lists.sizes(CHUNK)
WIDE = [5, 0, 40 * CHUNK + 3, 64]  # the third has more chunks than one lane, and than one warp, adds at once
STORAGES = sorted(ops.STORAGES)
EVERY_RULE = pytest.mark.parametrize("rule", lists.RULES)


def make(rule, backend, storage=None, counts=COUNTS, layers=False, state_type="fp32"):
    dtype = getattr(torch, (storage or "float32").split("_")[0])
    kept = torch.zeros(len(counts), ops.LAYER_SIZE, dtype=torch.float64) if layers else None
    params = lists.draw(counts, dtype, seed=5)
    return lists.Setup(params, rule, storage, layers=kept, backend=backend, state_type=state_type)


def both(library, rule, **more):
    """The same list for the CPU core and for the CUDA kernels."""
    return make(rule, ops.CppBackend(), **more), make(rule, host_cuda.HostCuda(library), **more)


@EVERY_RULE
@pytest.mark.parametrize("storage", STORAGES)
def test_every_rule_in_every_storage(library, rule, storage):
    own, twin = both(library, rule, storage=storage)
    for step, dtype in enumerate((own.params[0].dtype, torch.float32)):
        for setup in (own, twin):
            setup.step(lists.draw(COUNTS, dtype, seed=step), norm=True, clip=True, max_norm=300.0)
    assert_same(own, twin, storage)
    assert twin.backend.launches == (3 if ops.RULES[rule].norms == "direction" else 2)


@EVERY_RULE
@pytest.mark.parametrize("storage", [None, "bfloat16_remainder"])
@pytest.mark.parametrize("state_type", ["bf16", "8bit"])
def test_every_rule_with_narrow_states(library, rule, storage, state_type):
    """Equal to the CPU's but for a few values that another order of arithmetic moves to the next code."""
    own, twin = both(library, rule, storage=storage, state_type=state_type)
    for seed in (0, 1):
        for setup in (own, twin):
            setup.step(lists.draw(COUNTS, seed=seed), norm=True, clip=True, max_norm=300.0)
    assert_same_but_for_codes(own, twin)
    assert twin.backend.launches == (3 if ops.RULES[rule].norms == "direction" else 2)


@pytest.mark.parametrize("state_type", ["bf16", "8bit"])
def test_no_order_of_threads_changes_a_narrow_state(library, state_type):
    setups = [make("Adan", host_cuda.HostCuda(library, back), state_type=state_type) for back in (False, True)]
    for setup in setups:
        setup.step(lists.draw(COUNTS, torch.bfloat16, seed=1), norm=True)
        setup.step(lists.draw(COUNTS, seed=2), norm=True)
    assert same_bits(setups[0].bits(), setups[1].bits())


@EVERY_RULE
@pytest.mark.parametrize("state_type", ["fp32", "8bit"])
def test_gradients_are_left_unscaled(library, rule, state_type):
    own, twin = both(library, rule, storage="float16", state_type=state_type)
    for setup in (own, twin):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            lists.unscale(setup, dtype)
    if state_type == "fp32":
        assert_same(own, twin, "float16")
    else:
        assert_same_but_for_codes(own, twin)


@EVERY_RULE
def test_the_order_of_threads_and_blocks_changes_no_bit(library, rule):
    setups = [make(rule, host_cuda.HostCuda(library, backwards)) for backwards in (False, True)]
    for setup in setups:
        setup.step(lists.draw(COUNTS, torch.bfloat16, seed=1), norm=True)
        setup.step(lists.draw(COUNTS, seed=2), norm=True)
    assert same_bits(setups[0].bits(), setups[1].bits())
    assert torch.equal(setups[0].ledger.values, setups[1].ledger.values)


@EVERY_RULE
def test_phases_apart_are_the_step(library, rule):
    whole, apart = (make(rule, host_cuda.HostCuda(library)) for _ in range(2))
    for seed in (1, 2):
        grads = lists.draw(COUNTS, seed=seed)
        whole.step(grads, norm=True, clip=True, max_norm=100.0)
        apart.step(grads, lambda tensors: None, norm=True, clip=True, max_norm=100.0)
    assert same_bits(whole.bits(), apart.bits())


@pytest.mark.parametrize("rule", ["SgdMomentum", "Lars", "Lamb"])
def test_accumulation_noise_per_tensor_and_a_bad_step(library, rule):
    setups = both(library, rule, counts=WIDE, layers=True)
    for step in range(3):
        micro = [lists.draw(WIDE, torch.bfloat16 if step else torch.float32, seed=9 * step + i) for i in range(3)]
        if step == 1:
            micro[1][2][7] = math.inf
        for setup in setups:
            for i, grads in enumerate(micro):
                setup.accumulate([None if i == 1 and not j else g for j, g in enumerate(grads)], 4.0, first=not i)
            setup.step(
                [None] * 4, sum=True, known=True, noise=True, clip=True, max_norm=20.0,
                inverse=1 / 3, examples=12.0, micro_batches=3.0,
            )  # fmt: skip
    assert float(setups[0].ledger["skipped"]) == 1.0
    assert_same(*setups)


def test_packs_that_are_loaded_ahead_are_added_too(library):
    """A chunk of eight vectors a thread: the loop that takes four at once takes two turns, then come single ones."""

    class Long(host_cuda.HostCuda):
        chunk = 8192

    counts = [Long.chunk + 5 * 1024 + 7, 3]
    setups = [make("Sgd", backend, counts=counts) for backend in (ops.CppBackend(), Long(library))]
    for setup in setups:
        for i, dtype in enumerate((torch.float32, torch.bfloat16)):
            setup.accumulate(lists.draw(counts, dtype, seed=i), 4.0, first=not i)
        setup.step([None] * 2, sum=True, known=True, clip=True, max_norm=20.0)
    assert_same(*setups)


def test_a_full_ring_folds_with_those_of_the_tensors(library):
    setups = both(library, "Sgd", counts=[3, 50], layers=True)
    for setup in setups:
        generator = torch.Generator().manual_seed(0)
        setup.layers[:, ops.LAYER_SUMS :].copy_(torch.randn(2, 96, generator=generator))
        setup.ledger.ring.copy_(torch.randn(256, 3, generator=generator))
        setup.ledger.values[_C.ledger["ring_steps"]] = 256.0
        for seed in (1, 2, 3):
            for i in range(2):
                setup.accumulate(lists.draw([3, 50], seed=2 * seed + i), 4.0, first=not i)
            setup.step([None] * 2, sum=True, known=True, noise=True, inverse=0.5, examples=8.0, micro_batches=2.0)
    assert float(setups[1].ledger["ring_length"]) == 2.0
    torch.testing.assert_close(setups[1].layers, setups[0].layers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(setups[1].ledger.ring, setups[0].ledger.ring, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_carried_norm_is_the_one_taken_anew(library, storage):
    carried, anew = (make("Lars", host_cuda.HostCuda(library), storage=storage) for _ in range(2))
    for seed in (1, 2):
        grads = lists.draw(COUNTS, seed=seed)
        carried.step(grads)
        anew.list.forget()
        anew.step(grads)
        assert same_bits(carried.bits(), anew.bits())


@EVERY_RULE
def test_follow_takes_the_last_verdict(library, rule):
    setups = both(library, rule, counts=[8, 70])
    for skip in (0.0, 1.0):
        for setup in setups:
            setup.ledger.values[_C.ledger["skip"]] = skip
            before = setup.bits()
            setup.step(lists.draw([8, 70], seed=1), follow=True, clip=True, max_norm=1e-9)
            assert same_bits(before, setup.bits()) == bool(skip)
    if ops.RULES[rule].norms != "gradient":  # follow never takes a norm first
        assert_same(*setups)


def test_random_bits_are_those_of_the_cpu(library):
    for storage in [name for name in STORAGES if name.endswith("_stochastic")]:
        own, twin = both(library, "MuonMove", storage=storage)
        for setup in (own, twin):
            setup.set_hyper(torch.finfo(setup.params[0].dtype).eps / 4, weight_decay=0.0, adjustment=1.0)
            for p in setup.params:
                p.fill_(1.0)
            setup.step([torch.ones(n) for n in COUNTS])
        assert same_bits(own.params, twin.params)
        moved = torch.cat(own.params) != 1.0
        assert 0.48 < moved.double().mean() < 0.52


def test_a_barrier_that_some_threads_miss_is_found(tmp_path):
    source = tmp_path / "missed.cpp"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        'extern "C" int missed() {\n'
        "    return host_cuda::launch(1, 64, [] { if (threadIdx.x < 40) __syncthreads(); });\n"
        "}\n"
    )
    library = tmp_path / "missed.so"
    shim = host_cuda.ROOT / "tests/kernels/cuda_on_host"
    subprocess.run(["c++", "-std=c++20", "-fPIC", "-shared", f"-I{shim}", "-o", library, source], check=True)
    assert ctypes.CDLL(str(library)).missed() == 719


@EVERY_RULE
def test_a_term_with_a_zero_coefficient_is_left_out(library, rule):
    """0 times infinity is NaN."""
    own, twin = (lists.infinities(setup) for setup in both(library, rule))
    assert torch.equal(own.isnan(), twin.isnan())
    torch.testing.assert_close(twin, own, rtol=2e-5, atol=1e-5, equal_nan=True)
