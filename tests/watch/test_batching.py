"""Which dimension is the batch, and arguments at another size."""

import pytest
import torch
from torch import nn

from pybatch.base.errors import WorkloadError
from pybatch.watch.batching import BatchSecond, alternatives, examples_in, find_batching, resized, resized_like

T = torch.zeros
IMAGES = ((T(16, 3, 8, 8),), {})
TOKENS = ((T(35, 20), (T(2, 20, 64), T(2, 20, 64))), {})  # [length, batch], and a hidden state
NAMED = ((), {"input_ids": T(4, 128), "attention_mask": T(4, 128), "labels": T(4), "use_cache": False})
MASKED = ((T(8, 32, 16), T(32, 32)), {})  # a mask of lengths has no examples
SQUARE = ((T(20, 20), T(2, 20)), {})


@pytest.mark.parametrize(
    ("arguments", "size", "dims"),
    [
        (IMAGES, 16, (0,)),
        (TOKENS, 20, (1, 1, 1)),
        (NAMED, 4, (0, 0, 0, None)),
        (SQUARE, 20, (0, 1)),
        (((T(35, 20),), {}), 35, (0,)),
    ],
)
def test_batch_dimension(arguments, size, dims):
    found = find_batching(arguments)
    assert (found.size, found.dims) == (size, dims)
    assert examples_in(arguments, found) == size


def test_alternatives_are_where_the_size_stands_twice():
    def dims(arguments):
        return [found.dims for found in alternatives(arguments, find_batching(arguments))]

    assert dims(SQUARE) == [(1, 1)]
    assert dims(((T(20, 20), T(20, 20)), {})) == [(0, 1), (0, None), (1, 0), (1, 1), (1, None)]
    assert dims(IMAGES) == dims(TOKENS) == dims(MASKED) == []


def test_a_mask_of_lengths_is_left_alone():
    for seen in ([], [8]):
        found = find_batching(MASKED, seen)
        assert (found.size, found.dims) == (8, (0, None))
    assert find_batching(((T(8, 32), T(32)), {})).dims == (0, None)
    assert find_batching(((3, "no tensor"), {})) is None


def test_layers_with_the_batch_second_decide_where_shapes_do_not():
    second = BatchSecond()
    second.see(nn.Linear(2, 2), (T(35, 20, 64),))
    second.see(nn.LSTM(2, 2, batch_first=True), (T(20, 35, 64),))
    assert second.sizes == []
    second.see(nn.LSTM(2, 2), (T(35, 20, 64),))
    assert second.sizes == [20]
    assert find_batching(((T(35, 20),), {}), second.sizes).dims == (1,)
    # Attention inside a model that is given images: [positions, batch, width], and the batch comes first outside.
    assert find_batching(((T(20, 3, 8, 8),), {}), second.sizes).dims == (0,)


def test_resized_cuts_and_repeats():
    tokens, state = torch.arange(6).reshape(2, 3), torch.ones(3, requires_grad=True)
    given = ((tokens, {"state": state}), {"flag": True})
    found = find_batching(given, [3])
    (small, inner), named = resized(given, found, 2)
    assert small.tolist() == [[0, 1], [3, 4]]
    assert inner["state"].requires_grad
    assert inner["state"].is_leaf
    assert named == {"flag": True}
    (large, _), _ = resized(given, found, 7)
    assert large[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert tokens.shape == (2, 3)


def test_a_gradient_follows_its_output():
    gradient = torch.arange(6.0).reshape(6, 1)
    assert resized_like(gradient, torch.zeros(8, 1)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert resized_like(torch.tensor(2.0), torch.tensor(0.0)) == 2.0
    with pytest.raises(WorkloadError, match="1 dimensions at another batch size where it had 2"):
        resized_like(gradient, torch.zeros(8))
