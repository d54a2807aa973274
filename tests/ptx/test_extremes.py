"""The verdict on gradients at the ends of fp32, in the device code itself."""

import pytest
from cases import extremes, ptx


@pytest.mark.parametrize("name", ["inf", "inf and nan", "-1e20", "1e20 everywhere", "1e-30 everywhere", "subnormal"])
def test_device_code_gives_the_verdict_of_float64(library, programs, name):
    backend = ptx.PtxCuda(library, programs)
    extremes.check(ptx.setup("Sgd", backend), name)
    assert not backend.emulator.faults
