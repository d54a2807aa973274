"""What the compiler made of the hot kernels for sm_90, read from the installed core: loads, registers, local memory.

An H200 moves 4.3 TB/s at a latency of 0.8 us: by Little's law 26 KB must be under way on each of its 132
multiprocessors.
"""

import pytest
from cases import sass

from pybatch import _C, ops

THREADS = 3 * 256  # of a multiprocessor: kResident blocks of kThreads, kernels/reduce.cuh
REGISTERS = 65536 // THREADS // 8 * 8  # a thread, in the units they are given out in: 80
NEEDED = 26_000  # bytes under way in a multiprocessor


@pytest.fixture(scope="module")
def kernels():
    built = ops.build()
    if "90" not in (built.cuda_architectures or ""):
        pytest.skip(f"no code for sm_90 in this installation: {built.cuda_reason or built.cuda_architectures}")
    if sass.tool("cuobjdump") is None:
        pytest.skip("cuobjdump is neither on PATH nor in the package triton")
    found = sass.kernels(_C.__file__)
    return {part: next(k for name, k in found.items() if mangled(part) in name) for part in PARTS}


def mangled(part):
    """Of the kernel of this part, as it stands in the compiler's names."""
    return f"{len(part) + 7}{part}_kernel"


PARTS = ("norm", "prepare", "update", "accumulate")


def vector_loops(kernel, stores):
    """Innermost loops over elements that take vectors, as their loads under way before the first store.

    stores: how many 128-bit stores such a loop has at least. An unaligned gradient is read by single loads, which are
    predicated on it and stand beside the vector load: they are left out.
    """
    for loop in kernel.innermost_loops():
        wide = [i for i in loop if i.name in ("ST", "STG") and i.bytes == 16]
        if len(wide) >= stores:
            yield [i for i in sass.loads_before_a_store(loop) if i.bytes >= 8]


@pytest.mark.parametrize("part", PARTS)
def test_three_blocks_fit_and_nothing_spills(kernels, part):
    kernel = kernels[part]
    assert kernel.registers <= REGISTERS
    assert kernel.stack == 0
    assert not [i.opcode for i in kernel.instructions if i.name in ("LDL", "STL")]


@pytest.mark.parametrize("part", PARTS)
def test_no_loop_over_elements_calls_a_slow_path(kernels, part):
    """Division and root in the loop are approximate to 2 units: the exact ones call a function for an operand of 0."""
    for loop in kernels[part].innermost_loops():
        assert not any(i.name == "CALL" for i in loop)


@pytest.mark.parametrize("part", ["prepare", "update"])
def test_a_rules_scalars_are_made_outside_the_loops_over_elements(kernels, part):
    """They are in double: bias corrections, roots, rates. Loops that store doubles alone fold the noise ring."""
    loops = [
        loop for loop in kernels[part].innermost_loops() if any(i.name in ("ST", "STG") and i.bytes != 8 for i in loop)
    ]
    assert len(loops) >= 6
    for loop in loops:
        assert not [i.opcode for i in loop if i.is_double]


def test_accumulate_has_twice_the_bytes_needed_under_way(kernels):
    """Four packs of the sum and of the gradient, loaded before one is stored, for each of three types of gradients."""
    staged = list(vector_loops(kernels["accumulate"], stores=4))
    assert len(staged) == 3
    for loads in staged:
        assert [i.bytes for i in loads].count(16) >= 4
        assert len(loads) == 8
        assert sum(i.bytes for i in loads) * THREADS >= 2 * NEEDED


def test_norm_reads_vectors_of_16_bytes_of_every_type(kernels):
    """Of fp32 and both 16-bit types, four at least in a turn: nothing is stored, so all of a turn are under way."""
    loops = [[i for i in loop if i.name in ("LD", "LDG")] for loop in kernels["norm"].innermost_loops()]
    wide = [loads for loads in loops if len(loads) >= 4 and all(i.bytes == 16 for i in loads)]
    assert len(wide) >= 3
    assert all(sum(i.bytes for i in loads) * THREADS >= NEEDED for loads in wide)


def test_update_reads_all_that_a_rule_needs_before_it_stores(kernels):
    """Parameter, gradient and states, 16 bytes each: AdamW has 64 bytes a thread under way, more than needed."""
    loops = list(vector_loops(kernels["update"], stores=1))
    fp32 = [loads for loads in loops if all(i.bytes == 16 for i in loads)]
    assert len(fp32) >= len(ops.RULES)  # one for each at least
    assert max(len(loads) for loads in fp32) >= 1 + max(rule.states for rule in ops.RULES.values())
    most = sorted(len(loads) for loads in fp32)
    adam = [n for n in most if n >= 4]
    assert len(adam) >= sum(rule.states >= 2 and rule.norms == "none" for rule in ops.RULES.values())
