"""That the emulator finds what is wrong: faults planted into the CUDA source, and into the PTX by the instruction."""

import pytest
from cases import planted_faults, ptx

RULE, STORAGE, SCENARIO = "Lars", "bfloat16", "layers"


def is_wrong(library, programs):
    """Whether a fault or a wrong value shows."""
    try:
        ptx.check(library, programs, RULE, STORAGE, SCENARIO)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", planted_faults.SAMPLE)
def test_a_fault_in_the_source_is_found(library, programs, tmp_path, name):
    file, old, new, kind = planted_faults.SOURCE[name]
    patched = ptx.compile_kernels(tmp_path, [(file, old, new)], ["accumulate"])
    assert kind in ptx.faults_of(library, programs | patched, RULE, STORAGE, SCENARIO)


def test_none_is_found_where_none_is(library, programs):
    assert ptx.faults_of(library, programs, RULE, STORAGE, SCENARIO) == set()


def test_a_shifted_access_and_a_fence_left_out_are_found(library, programs):
    """A sample of what bench/ptx.py plants, of accesses that the scenario makes: by a fault, or by a wrong value."""
    ran = ptx.check(library, programs, RULE, STORAGE, SCENARIO).lines(list(programs).index("accumulate"))
    faults = [of for of in planted_faults.planted(programs["accumulate"], "accumulate_kernel") if of[0] in ran]
    shifts, fences = ([of for of in faults if word in of[1]] for word in ("shifted", "fence"))
    assert len(shifts) > 150
    assert len(fences) == 2
    for line, what, text in shifts[::17] + fences:
        assert is_wrong(library, programs | {"accumulate": text}), f"line {line}, {what}"
