"""The C++ core divides its passes between threads, whatever else runs beside these tests: one would show less."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
