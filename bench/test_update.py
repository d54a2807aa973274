"""One optimizer step, side by side: `pytest bench --benchmark-enable --benchmark-group-by=param:shapes`.

A quick look at each step's own time, with a warm cache. The ratios that are quoted come from step.py, which validates,
flushes the cache and interleaves the two sides.
"""

import pytest
import torch
from shapes import SHAPES
from tensors import gradients, parameters

from pybatch.optim import SGD, AdamW

OPTIMIZERS = {
    "pybatch AdamW": lambda params: AdamW(params),
    "torch AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "pybatch SGD": lambda params: SGD(params, lr=1e-3, momentum=0.9),
    "torch SGD fused": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "torch SGD foreach": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, name, shapes):
    cpu = torch.device("cpu")
    params = parameters(SHAPES[shapes], cpu)
    for param, grad in zip(params, gradients(params, 0), strict=True):
        param.grad = grad
    optimizer = OPTIMIZERS[name](params)
    benchmark.pedantic(optimizer.step, rounds=15, warmup_rounds=2)
