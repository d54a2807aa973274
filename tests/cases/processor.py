"""Tests of what only some processors can: skipped elsewhere, with torch's own reason."""

import pytest

from pybatch.device.abilities import refusal


def runs(layer, dtype):
    """A mark for tests of such a layer under autocast to `dtype` on the CPU."""
    why = refusal(layer, dtype)
    return pytest.mark.skipif(why is not None, reason=f"no {layer.__name__} in {dtype} on this processor: {why}")
