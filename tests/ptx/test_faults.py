"""That the emulator finds what is wrong: faults planted into the CUDA source, and into the PTX by the instruction."""

import pytest
from cases import planted_faults, ptx

RULE, STORAGE, SCENARIO = "SgdMomentum", "bfloat16", "layers"


def faults_of(library, programs):
    """Kinds of the faults in one run of the scenario, whatever it computes."""
    twin = ptx.PtxCuda(library, programs)
    try:
        ptx.SCENARIOS[SCENARIO](ptx.setup(RULE, twin, STORAGE, layers=True))
    except AssertionError:
        assert twin.emulator.faults
    return {fault.split(",")[0] for fault in twin.emulator.faults}


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize("name", planted_faults.SOURCE)
def test_a_fault_in_the_source_is_found(library, programs, tmp_path, name):
    file, old, new, kind = planted_faults.SOURCE[name]
    patched = ptx.compile_kernels(tmp_path, [(file, old, new)], ["accumulate"])
    assert kind in faults_of(library, programs | patched)


def test_none_is_found_where_none_is(library, programs):
    assert faults_of(library, programs) == set()


@pytest.fixture(scope="module")
def shifted(library, programs):
    """Accesses that the scenario makes, shifted: (line, what, PTX)."""
    emulator = ptx.check(library, programs, RULE, STORAGE, SCENARIO)
    ran = emulator.lines(list(programs).index("accumulate"))
    faults = planted_faults.planted(programs["accumulate"], "accumulate_kernel")
    return [fault for fault in faults if fault[0] in ran]
