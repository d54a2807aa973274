"""What is taken for clipping where gradients change through `.data`."""

import pytest
import torch
from torch import nn

from pybatch.watch.clipping import Left


def scaled(params, factor):
    for p in params:
        p.grad.data.mul_(factor)


def decayed(params):
    for p in params:
        p.grad.data.add_(p.data, alpha=0.1)


CHANGES = {
    "all by one factor": (lambda params: scaled(params, 0.3), True),
    "one of two": (lambda params: scaled(params[:1], 0.3), False),
    "each by its own": (lambda params: [scaled([p], 0.3 + i) for i, p in enumerate(params)], False),
    "weight decay": (decayed, False),
    "none": (lambda params: None, False),
    "in place": (lambda params: nn.utils.clip_grad_norm_(params, 1e-3), True),
    "overflown": (lambda params: scaled(params, float("inf")), False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_one_factor_for_all_is_clipping(change, dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(dtype)
    params = [*model.parameters(), nn.Parameter(torch.ones(3, dtype=dtype))]
    params[-1].grad = torch.zeros(3, dtype=dtype)  # one that the loss does not reach
    model(torch.randn(6, 8, dtype=dtype)).square().mean().backward()
    params = params if change != "weight decay" else params[:2]
    call, expected = CHANGES[change]
    left = Left(params)
    call(params)
    assert left.clipped(None) == expected
