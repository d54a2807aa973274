"""The LSTM of a stack against each replica's own of torch: the same outputs and gradients."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from pybatch.scaling import Scaled
from pybatch.training.folding import Folding
from pybatch.training.loop import Loop
from pybatch.training.recurrent import recurrent
from pybatch.training.stack import Stack
from pybatch.training.trial import Trial
from pybatch.training.updates import arguments
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")
REPLICAS, EXAMPLES, STEPS, WIDTH = 3, 4, 5, 6


@pytest.mark.parametrize(
    "options",
    [{"batch_first": True}, {"num_layers": 2}, {"num_layers": 2, "bias": False, "batch_first": True}, {"dropout": 0.5}],
)
@pytest.mark.parametrize("given", ["no states", "shared states", "own states"])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")  # of one layer there is nothing to drop
def test_outputs_and_gradients_are_those_of_each_replica(options, given):
    torch.manual_seed(0)
    layers = [nn.LSTM(WIDTH, 7, **options).double() for _ in range(REPLICAS)]
    if options.get("num_layers", 1) == 1:
        for layer in layers:
            layer.eval()
    parameters, _ = stack_module_state(layers)
    size = (EXAMPLES, STEPS, WIDTH) if options.get("batch_first") else (STEPS, EXAMPLES, WIDTH)
    words = torch.randn(REPLICAS, *size, dtype=torch.float64, requires_grad=True)
    own = given == "own states"
    states = torch.randn(2, *[REPLICAS] * own, options.get("num_layers", 1), EXAMPLES, 7, dtype=torch.float64)
    states.requires_grad_()
    weights = torch.randn(3, EXAMPLES * STEPS * 7, dtype=torch.float64)

    def one(parameters, words, hidden, cell):
        begun = None if given == "no states" else (hidden, cell)
        outputs, (last, final) = functional_call(layers[0], parameters, (words, begun))
        parts = zip((outputs, last, final), weights, strict=True)
        return sum((part.flatten() * by[: part.numel()]).sum() for part, by in parts)

    leaves = [*parameters.values(), words, states]
    dims = (0, 0, 0, 0) if own else (0, 0, None, None)
    with Folding(images=False):
        losses = torch.vmap(one, in_dims=dims)(parameters, words, *states)
    found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    each = []
    for r in range(REPLICAS):
        begun = states[:, r] if own else states
        each.append(one({name: p[r] for name, p in parameters.items()}, words[r], *begun))
    expected = torch.autograd.grad(sum(each), leaves, allow_unused=True)
    torch.testing.assert_close(losses, torch.stack(each), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_stack_of_lstms_trains_as_the_loop_does():
    group = arguments("sgd", {"momentum": 0.9})
    some = [
        Trial("t", "sgd", Scaled(group | {"lr": lr}), 4, seed, "fp32", "cpu") for lr in (0.02, 0.1) for seed in (0, 1)
    ]
    workload = find("text", model="lstm", options=["length=8"])
    apart, together = Loop(workload, some, CPU), Stack(workload, some, CPU)
    for made in (apart, together):
        made.advance(4)
    np.testing.assert_allclose(together._evaluate(True), apart.evaluate(), rtol=1e-5)
    for mine, theirs in zip(together.gradients([0, 3]), apart.gradients([0, 3]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_what_it_does_not_know_is_left_to_torch():
    input, states = torch.zeros(2, 3, 4), [torch.zeros(1, 2, 5)] * 2
    weights = [torch.zeros(20, 4), torch.zeros(20, 5)]
    assert recurrent(input, states, weights, False, 1, 0.0, True, False, True) is not None
    assert recurrent(input, states, weights, False, 1, 0.5, False, False, True) is not None  # dropout in evaluation
    assert recurrent(input, states, weights, False, 1, 0.5, True, False, True) is None
    assert recurrent(input, states, weights * 2, False, 1, 0.0, True, True, True) is None
    assert recurrent(input, states, [*weights, torch.zeros(3, 5)], False, 1, 0.0, True, False, True) is None
    assert recurrent(input, torch.tensor([2, 1]), states, weights, False, 1, 0.0, True, False) is None  # packed
