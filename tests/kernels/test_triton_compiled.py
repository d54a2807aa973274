"""Every Triton kernel compiled for sm_90, and what the compiler made of the hot ones: loads, registers, no spills."""

from functools import partial

import pytest
from cases import for_sm_90, sass

from pybatch import ops

pytest.importorskip("triton")

REGISTERS = 64  # a thread: four blocks of 256 threads on a multiprocessor
NEEDED = 26_000  # bytes under way there, as in test_compiled.py
TOGETHER = 4  # kinds of a kernel; of all of them the compiler takes twice as long for each
SHAPE = {"block": 2048, "chunk_size": 8192}
DECISION = {"taken": True, "clip": True, "follow": False}
PREPARE, UPDATE = {"preparing": True, "unscale": False}, {"preparing": False, "unscale": False}


def numbers(*kinds):
    """(code, type of the gradient) of each (rule, storage, dtype)."""
    return [
        (ops.RULES[rule].number * len(ops.STORAGES) + ops.STORAGES[storage], ops.STORAGES[dtype])
        for rule, storage, dtype in kinds
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles a kernel with these constants."""
    types = {"rows": "*i64", "chunks": "*i64", "starts": "*i64", "steps": "*fp32", "scalars": "*fp32"}
    types |= dict.fromkeys(["partials", "hyper", "ledger", "ring", "share", "norms", "carried", "layers"], "*fp64")
    types["codes"] = "*fp32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield partial(for_sm_90.compile_kernel, arguments=types)


@pytest.fixture
def machine_code(build, tmp_path):
    def machine_code(kernel, **constants):
        if sass.tool("cuobjdump") is None:
            pytest.skip("cuobjdump is neither on PATH nor in the package triton")
        place = tmp_path / "kernel.cubin"
        place.write_bytes(build(kernel, **SHAPE, **constants).asm["cubin"])
        (found,) = sass.kernels(place).values()
        return found

    return machine_code


def vectors(kernel, stores):
    """Of each innermost loop that stores at least so many vectors: its loads before the first store."""
    loops = [
        loop
        for loop in kernel.innermost_loops()
        if sum(i.name in ("ST", "STG") and i.bytes >= 8 for i in loop) >= stores
    ]
    return [sass.loads_before_a_store(loop) for loop in loops]


def assert_is_lean(kernel, registers=REGISTERS):
    assert kernel.registers <= registers
    assert kernel.stack == 0
    assert not [i.opcode for i in kernel.instructions if i.name in ("LDL", "STL")]
    for loop in kernel.innermost_loops():
        assert not any(i.name == "CALL" for i in loop)  # division and root without their slow paths


def assert_enough_under_way(kernel, loads):
    resident = 65536 // (kernel.registers * 256)
    assert sum(i.bytes for i in loads) * 256 * resident >= NEEDED


@pytest.mark.parametrize("storage", ["float32", "bfloat16_master"])
def test_update_loads_eight_elements_a_thread_by_vectors_before_it_stores(machine_code, storage):
    """AdamW: parameter or master, gradient, two moments; of each all that a thread takes at a time."""
    from pybatch.kernels import phases, rules

    dtype = storage.split("_")[0]
    kinds = rules.kinds(numbers(("AdamW", storage, dtype)))
    constants = {"kinds": kinds, "source": 1, "state_type": 0, **UPDATE}
    kernel = machine_code(phases.step_kernel, **constants, **DECISION)
    assert_is_lean(kernel)
    (loads,) = vectors(kernel, stores=6)
    assert sum(i.bytes for i in loads) == 8 * (4 + (4 if dtype == "float32" else 2) + 4 + 4)
    assert all(i.bytes == 16 for i in loads)
    assert_enough_under_way(kernel, loads)


def test_accumulate_and_norm_read_by_vectors(machine_code):
    from pybatch.kernels import accumulate, phases, rules

    kernel = machine_code(accumulate.accumulate_kernel, types=(ops.STORAGES["float32"],))
    assert_is_lean(kernel, registers=96)  # six sums are kept of each of a thread's eight elements
    (loads,) = vectors(kernel, stores=2)
    assert [i.bytes for i in loads] == [16] * 4
    assert_enough_under_way(kernel, loads)

    kinds = rules.kinds(numbers(("AdamW", "float32", "float32")))
    kernel = machine_code(phases.norm_kernel, kinds=kinds, source=1, gradients=True)
    assert_is_lean(kernel)
    wide = [[i for i in loop if i.name == "LDG" and i.bytes == 16] for loop in kernel.innermost_loops()]
    assert max(map(len, wide)) >= 2


def test_every_kernel_compiles_for_a_gpu(build):
    """The interpreter accepts programs the compiler does not, such as variables that change their type in a branch."""
    from pybatch.kernels import accumulate, ledger, phases, rules

    storages = list(ops.STORAGES)
    every = [(rule, storages[i % len(storages)], storages[i % 3]) for i, rule in enumerate(ops.RULES)]
    tiny = {"block": 64, "chunk_size": 128, "warps": 2, "source": 1}  # an element a thread: quick to compile
    lars, lamb = rules.with_norms("gradient", rules.RULES), rules.with_norms("direction", rules.RULES)
    small = {"block": 256, "chunk_size": 512, "warps": 4, "source": 1}
    carried = [("Lars", storage, storages[i % 3]) for i, storage in enumerate(storages)]
    for i in range(0, len(carried), TOGETHER):
        build(phases.norm_kernel, kinds=rules.kinds(numbers(*carried[i : i + TOGETHER])), gradients=True, **tiny)
    build(phases.norm_kernel, kinds=rules.kinds(numbers(*carried)), gradients=True, **tiny)  # all kinds in one list
    kinds = rules.kinds(numbers(("Lamb", "bfloat16_remainder", "float16")))
    build(phases.step_kernel, kinds=kinds, state_type=ops.STATE_TYPES["8bit"], **small, **DECISION, **PREPARE)
    plain = {"state_type": ops.STATE_TYPES["fp32"], **UPDATE}
    for i in range(0, len(every), TOGETHER):
        kinds = rules.kinds(numbers(*every[i : i + TOGETHER]))
        build(phases.step_kernel, kinds=kinds, **plain, **tiny, **DECISION)
    kinds = rules.kinds(numbers(("SgdMomentum", "float16_stochastic", "bfloat16")))
    for name in ("bf16", "8bit"):
        unscaling = {"state_type": ops.STATE_TYPES[name], **UPDATE, "unscale": True}
        build(phases.step_kernel, kinds=kinds, **unscaling, **small, **DECISION)
    follow = DECISION | {"taken": False, "clip": False, "follow": True}
    kinds = rules.kinds(numbers(("MuonMove", "float32", "float32")))
    of_sums = tiny | {"source": 2, "state_type": 0}
    build(phases.step_kernel, kinds=kinds, **UPDATE, **of_sums, **follow)
    build(accumulate.accumulate_kernel, types=(0, 1, 2), block=64, chunk_size=128, warps=2)
    build(ledger.collect_kernel, block=1024, micro=True)
    rows = {"block": 64, "source": 1, "layered": True}
    build(ledger.collect_rows_kernel, carriers=lars, prepared=(), gradients=True, micro=True, **rows)
    build(ledger.collect_rows_kernel, carriers=(), prepared=lamb, gradients=False, micro=False, **rows)
    keepers = rules.selection(rules.with_scalar(rules.RULES))
    build(ledger.settle_rows_kernel, carriers=lars, keepers=keepers, noise=True, **rows, **DECISION)


def test_the_bookkeeping_waits_for_every_warp(build):
    """Outside every branch: no warp reads the ring's count of steps, or sums, after one thread has written them."""
    from pybatch.kernels import ledger

    settle = build(ledger.settle_kernel, taken=True, clip=True, noise=True)
    level = [line for line in settle.asm["ttgir"].splitlines() if line.startswith("    ") and line[4] != " "]
    assert sum("barrier" in line for line in level) == 2, level
