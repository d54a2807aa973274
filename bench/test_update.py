"""One optimizer step, side by side: `pytest bench --benchmark-enable --benchmark-group-by=param:name,param:shapes`.

A quick look at each step's own time, with a warm cache. The ratios that are quoted come from step.py, which validates,
flushes the cache and interleaves the sides.
"""

import pytest
import torch
from peers import peers
from shapes import SHAPES
from step import OPTIMIZERS, ours
from tensors import gradients, parameters

CPU = torch.device("cpu")
MAKERS = {name: {"ours": lambda params, name=name: ours(name, params, "update", "fp32")} for name in OPTIMIZERS}
for name, makers in MAKERS.items():
    makers |= {peer: kind.make for peer, kind in peers(name, CPU)[0].items()}


@pytest.mark.parametrize("shapes", ["one tensor of 32 M", "1000 tensors of 64x64"])
@pytest.mark.parametrize(("name", "side"), [(name, side) for name, makers in MAKERS.items() for side in makers])
def test_step(benchmark, name, side, shapes):
    params = parameters(SHAPES[shapes], CPU)
    for param, grad in zip(params, gradients(params, 0), strict=True):
        param.grad = grad
    optimizer = MAKERS[name][side](params)
    benchmark.pedantic(optimizer.step, rounds=15, warmup_rounds=2)
