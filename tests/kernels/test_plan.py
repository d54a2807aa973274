"""The launch plan covers every element exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybatch import _C


def covered(sizes, chunk):
    """How often each element of each tensor lies in a chunk."""
    counts = [np.zeros(n, dtype=int) for n in sizes]
    for tensor, i in _C.plan(sizes, chunk):
        assert i * chunk < sizes[tensor]
        counts[tensor][i * chunk : (i + 1) * chunk] += 1
    return counts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 70), max_size=12), st.integers(1, 33))
def test_every_element_once(sizes, chunk):
    assert all((count == 1).all() for count in covered(sizes, chunk))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33])
def test_boundaries(size):
    pairs = _C.plan([size], 16)
    assert len(pairs) == -(-size // 16)
    assert all((count == 1).all() for count in covered([size], 16))


def test_order_is_by_tensor_then_chunk():
    pairs = _C.plan([40, 0, 17], 16).tolist()
    assert pairs == [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1]]


def test_more_than_two_to_the_31_elements():
    size, chunk = 2**31 + 5, 65536
    pairs = _C.plan([3, size], chunk)
    assert len(pairs) == 1 + 2**15 + 1
    last = pairs[-1]
    assert last.tolist() == [1, 2**15]
    assert size - int(last[1]) * chunk == 5


@pytest.mark.parametrize(("sizes", "chunk", "value"), [([-1], 16, "-1"), ([4], 0, "0")])
def test_impossible_sizes_are_refused(sizes, chunk, value):
    with pytest.raises(ValueError, match=value):
        _C.plan(sizes, chunk)
