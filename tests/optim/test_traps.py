"""Schedulers, names, many tensors, two devices: what torch's optimizers take, these take too."""

import copy

import numpy as np
import pytest
import torch
from cases import adamw, problem, sgd
from torch.optim import lr_scheduler

from pybatch import optim
from pybatch.base.errors import UsageError

STEPS = 8
SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.2, 1.0, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(opt, 0.7)], [3]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 3), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 3, cycle_momentum="momentum" in opt.defaults),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS + 1),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6, 2.0),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.01, 4),
}


def test_every_scheduler_of_torch_is_tried():
    bases = {"LRScheduler"}
    public = {name for name in lr_scheduler.__all__ if isinstance(getattr(lr_scheduler, name), type)}
    assert public - bases <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", [adamw, sgd], ids=["adamw", "sgd"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_scheduler_drives_it_as_it_drives_the_twin(case, name, tensor):
    runs = []
    for kind in (case.optimizer, case.twin):
        params = problem.tensors(small=True)
        options = {"momentum": 0.9} if case is sgd else {}
        opt = kind(params, lr=torch.tensor(0.1) if tensor else 0.1, **options)
        schedule = SCHEDULERS[name](opt)
        generator = torch.Generator().manual_seed(0)
        rates = []
        for _ in range(STEPS):
            problem.give_gradients(params, generator)
            opt.step()
            rates.append(float(opt.param_groups[0]["lr"]))
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        runs.append((params, rates))
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-6)
    assert len(set(runs[0][1])) > 1
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        np.testing.assert_allclose(problem.double(p), problem.double(q), rtol=2e-5, atol=2e-5)


def test_ten_thousand_tensors():
    """More than any table of kernel arguments or pool of handles holds."""
    runs = []
    for kind in (adamw.optimizer, adamw.twin):
        params = [torch.nn.Parameter(torch.full((i % 5 + 1,), float(i % 7))) for i in range(10_000)]
        opt = kind(params, lr=0.1)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if step == 1 and i % 3 == 0 else torch.full_like(p, float(i % 11 - 5))
            opt.step()
        runs.append(torch.cat([p.detach() for p in params]))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


def test_ten_thousand_tensors_accumulated():
    params = [torch.nn.Parameter(torch.zeros(i % 3 + 1)) for i in range(10_000)]
    opt = sgd.optimizer(params, lr=1.0)
    for n, value in ((1, 4.0), (3, 8.0)):
        for p in params:
            p.grad = torch.full_like(p, value)
        opt.accumulate(n)
    opt.step()
    assert torch.equal(torch.cat([p.detach() for p in params]), torch.full((19_999,), -7.0))


def train_named(opt, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in opt.param_groups for p in group["params"]]
    for _ in range(steps):
        for n in (4, 8, 4):
            for p in params:
                p.grad = 1.0 + torch.randn(n, *p.shape, generator=generator).mul(p.dim() + 1.0).mean(0)
            opt.accumulate(n)
        opt.step()


def test_noise_of_single_parameters_has_their_names_and_scales():
    """Gradients 1 + N(0, s^2) per element: the scale of each parameter is s^2, of all of them the mean by elements."""
    named = [("bias", torch.nn.Parameter(torch.zeros(300))), ("weight", torch.nn.Parameter(torch.zeros(20, 30)))]
    opt = optim.SGD(named, lr=0.0, noise=True)
    train_named(opt, 100)
    noise = opt.whole_noise
    assert [layer.name for layer in noise.layers] == ["bias", "weight"]
    np.testing.assert_allclose([layer.b_simple for layer in noise.layers], [4.0, 9.0], rtol=0.1)
    assert [(layer.status, layer.steps) for layer in noise.layers] == [("resolved", 100)] * 2
    assert all(0.8 * layer.b_simple < layer.low < layer.b_simple < layer.high for layer in noise.layers)
    np.testing.assert_allclose(sum(layer.trace for layer in noise.layers), noise.trace, rtol=1e-6)
    np.testing.assert_allclose(sum(layer.grad_sq for layer in noise.layers), noise.grad_sq, rtol=1e-6)


def test_noise_of_single_parameters_without_names_has_their_index():
    params = [torch.nn.Parameter(torch.zeros(30)) for _ in range(3)]
    opt = optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.0, noise=True)
    params[1].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for p in (params[0], params[2]):
            p.grad = 1.0 + torch.randn(30, generator=generator)
        opt.accumulate(2)
        for p in (params[0], params[2]):
            p.grad = 1.0 + torch.randn(30, generator=generator)
        opt.accumulate(2)
        opt.step()
    assert [layer.name for layer in opt.noise.layers] == ["0", "2"]


def test_noise_of_single_parameters_survives_saving_and_new_parameters():
    def make():
        return [torch.nn.Parameter(torch.zeros(40)), torch.nn.Parameter(torch.zeros(5, 6))]

    whole = optim.SGD(make(), lr=0.0, noise=True)
    train_named(whole, 10)
    train_named(whole, 10, seed=1)
    first = optim.SGD(make(), lr=0.0, noise=True)
    train_named(first, 10)
    second = optim.SGD(make(), lr=0.0, noise=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.noise == first.noise
    train_named(second, 10, seed=1)
    assert second.noise == whole.noise
    second.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    before = second.noise.layers
    for _ in range(2):
        for group in second.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        second.accumulate(1)
    second.step()
    after = second.noise.layers
    assert [layer.name for layer in after] == ["0", "1", "2"]
    assert after[0].grad_sq != before[0].grad_sq
    np.testing.assert_allclose(after[0].grad_sq, (before[0].grad_sq * 20 + 40.0) / 21, rtol=1e-6)


def test_a_parameter_without_gradient_in_a_step_gets_no_pair():
    p, q = (torch.nn.Parameter(torch.zeros(10)) for _ in range(2))
    opt = optim.SGD([p, q], lr=0.0, noise=True)
    for step in range(6):
        for _ in range(2):
            p.grad = torch.ones(10)
            q.grad = None if step % 2 else torch.full((10,), 2.0)
            opt.accumulate(3)
        opt.step()
    np.testing.assert_allclose([layer.grad_sq for layer in opt.noise.layers], [10.0, 40.0], rtol=1e-6)


def test_named_parameters_train_and_load_as_torchs():
    runs = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        opt = kind(net.named_parameters(), lr=0.1)
        for _ in range(3):
            net(torch.ones(1, 3)).sum().backward()
            opt.step()
            opt.zero_grad()
        assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
        runs.append(list(net.parameters()))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.LAMB, optim.Muon])
def test_parameters_on_two_devices_are_refused_before_anything_is_written(kind):
    here = torch.nn.Parameter(torch.ones(2, 2))
    there = torch.nn.Parameter(torch.ones(2, 2, device="meta"))
    opt = kind([here, there], lr=0.1)
    here.grad, there.grad = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    with pytest.raises(UsageError, match=r"parameter 1 of shape \(2, 2\) is on meta, the ones before it on cpu"):
        opt.step()
    assert torch.equal(here.detach(), torch.ones(2, 2))
    assert not opt.state.get(here)


def test_gradients_of_another_dtype_than_the_parameter():
    """torch lets p.grad_dtype differ: fp32 gradients of bf16 parameters lose nothing on the way in."""
    p = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    fine = torch.linspace(1.0, 1.01, 64)
    opt = sgd.optimizer([p], lr=1.0, master_weights=True)
    p.grad = fine.clone()
    opt.step()
    assert torch.equal(opt.state[p]["master"], -fine)


def test_a_closure_an_accumulation_and_no_gradient():
    p = torch.nn.Parameter(torch.ones(3))
    opt = sgd.optimizer([p], lr=0.5, max_grad_norm=10.0)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(3))

    def closure():
        loss = (p**2).sum()
        loss.backward()
        opt.accumulate(3)
        return loss

    assert opt.step(closure).item() == 3.0
    assert torch.equal(p.detach(), torch.zeros(3))


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0), ("a", 0.9), None])
def test_betas_that_are_no_pair_are_refused_with_the_usual_ones(betas):
    with pytest.raises(UsageError, match=r"betas .*The usual ones are \(0.9, 0.999\)"):
        optim.AdamW([torch.nn.Parameter(torch.ones(2))], betas=betas)


def test_lars_moves_by_its_defaults():
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = optim.LARS([p])
    p.grad = torch.ones_like(p)
    opt.step()
    assert float(p.detach()[0, 0]) == pytest.approx(1 - 1e-3)
