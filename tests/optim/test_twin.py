"""Every fused optimizer that torch has too, side by side with its twin: states, schedules, groups, clipping, AMP."""

import copy

import numpy as np
import pytest
import torch
from cases import adamw, lion, problem, sgd
from cases.catalogue import EXACT, optimizers, variants
from cases.problem import close, train

TWINS = [case for case in EXACT if case.twin is not None]
each_optimizer = optimizers(TWINS)


@variants(TWINS)
@pytest.mark.parametrize("first", ["ours", "torch"])
def test_state_dict_goes_to_the_twin_and_back_in_mid_training(case, options, first):
    ours, theirs = problem.tensors(small=True), problem.tensors(small=True)
    both = [(case.optimizer, ours), (case.twin, theirs)]
    a_kind, a = both[first == "torch"]
    b_kind, b = both[first != "torch"]
    a_opt = a_kind(a, lr=case.LR, **options)
    train(a_opt, a, 3)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    b_opt = b_kind(b, lr=123.0, **options)
    b_opt.load_state_dict(copy.deepcopy(a_opt.state_dict()))
    assert b_opt.param_groups[0]["lr"] == case.LR
    train(a_opt, a, 3, seed=4)
    train(b_opt, b, 3, seed=4)
    close(a, b)


@each_optimizer
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8, cycle_momentum=False),
    ],
    ids=["step", "cosine", "lambda", "onecycle"],
)
def test_schedulers_drive_it_as_they_drive_the_twin(case, scheduler):
    runs = []
    for kind in (case.optimizer, case.twin):
        params = problem.tensors(small=True)
        opt = kind(params, lr=case.LR)
        schedule = scheduler(opt)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            problem.give_gradients(params, generator)
            opt.step()
            schedule.step()
        runs.append(params)
    close(*runs)


@each_optimizer
def test_tensor_learning_rate_changed_in_place(case):
    runs = []
    for kind in (case.optimizer, case.twin):
        params, lr = problem.tensors(small=True), torch.tensor(case.LR)
        opt = kind(params, lr=lr)
        train(opt, params, 2)
        lr.mul_(0.1)
        train(opt, params, 2)
        runs.append(params)
    close(*runs)


@each_optimizer
def test_groups_with_options_of_their_own_frozen_and_late_ones(case):
    runs = []
    for kind in (case.optimizer, case.twin):
        params = problem.tensors(small=True)
        params[0].requires_grad_(False)
        opt = kind([{"params": params[:3]}, {"params": params[3:6], "lr": 0.3, "weight_decay": 0.5}, {"params": []}])
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            problem.give_gradients(params, generator)
            params[0].grad = None
            if step % 2:
                params[4].grad = None  # an expert that is not always used
            if step == 3:
                opt.add_param_group({"params": params[6:], "maximize": True})
            opt.step()
        runs.append(params)
    close(*runs)


def test_momentum_switched_on_in_mid_training():
    runs = []
    for kind in (sgd.optimizer, sgd.twin):
        params = problem.tensors(small=True)
        opt = kind(params, lr=0.1)
        train(opt, params, 2)
        opt.param_groups[0]["momentum"] = 0.9
        train(opt, params, 3, seed=5)
        runs.append(params)
    close(*runs)


@pytest.mark.parametrize("limit", [0.5, 1e6, float("inf")])
def test_clipping_is_clip_grad_norm_over_all_groups(limit):
    runs = []
    for fused in (True, False):
        params = problem.tensors(small=True)
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.01}]
        opt = sgd.optimizer(groups, lr=0.1, max_grad_norm=limit) if fused else sgd.twin(groups, lr=0.1)
        generator = torch.Generator().manual_seed(0)
        norms = []
        for _ in range(3):
            problem.give_gradients(params, generator)
            if not fused:
                norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit)))
            opt.step()
            if fused:
                norms.append(float(opt.grad_norm))
        runs.append((params, norms))
    close(runs[0][0], runs[1][0])
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-5)


def test_gradients_may_move_and_parameters_too():
    runs = []
    for kind in (adamw.optimizer, adamw.twin):
        params = problem.tensors(small=True)
        opt = kind(params, lr=0.1)
        train(opt, params, 2)
        for p in params:
            p.data = p.data.clone()
        train(opt, params, 2)
        runs.append(params)
    close(*runs)


def test_closure_and_no_gradient_at_all():
    p = torch.nn.Parameter(torch.ones(3))
    opt = sgd.optimizer([p], lr=0.5)
    assert opt.step() is None
    assert opt.grad_norm is None
    assert torch.equal(p, torch.ones(3))

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3.0
    assert torch.equal(p, torch.zeros(3))


@pytest.mark.parametrize("found", [False, True])
def test_grad_scaler(found):
    runs = []
    for kind in (adamw.optimizer, adamw.twin):
        params = problem.tensors(small=True)
        opt = kind(params, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            problem.give_gradients(params, generator)
            scaler.scale(torch.ones(()))
            for p in params:
                p.grad *= 1024.0 if not (found and step > 1) else 512.0  # the scale halves after the infinity
            if found and step == 1:
                params[0].grad[0] = float("inf")
            scaler.step(opt)
            scaler.update()
        runs.append((params, scaler.get_scale()))
    assert runs[0][1] == runs[1][1]
    close(runs[0][0], runs[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("found", [False, True])
def test_a_scaler_leaves_the_gradient_as_with_torchs_fused(found, dtype):
    """Unscaled, once where two parameters share it; as it was where the step was skipped."""
    left = []
    for kind, options in ((adamw.optimizer, {"master_weights": dtype != torch.float32}), (adamw.twin, {"fused": True})):
        params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5, 5, 3)]
        opt = kind(params, lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        shared = torch.linspace(-1, 2, 5).to(dtype) * 8
        params[0].grad = shared
        params[1].grad = shared if kind is adamw.optimizer else shared.clone()
        params[2].grad = torch.full((3,), float("inf") if found else 4.0, dtype=dtype)
        scaler.step(opt)
        left.append([p.grad.clone() for p in params])
    for own, twin in zip(*left, strict=True):
        assert torch.equal(own, twin)


def test_grad_scaler_with_clipping_clips_the_unscaled_gradient():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = sgd.optimizer([p], lr=1.0, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale((p * 0.1).sum()).backward()
    scaler.step(opt)
    np.testing.assert_allclose(float(opt.grad_norm), 0.2, rtol=1e-6)
    np.testing.assert_allclose(problem.double(p), -0.1, rtol=1e-6)


@pytest.mark.parametrize("options", lion.VARIANTS[:3], ids=str)  # it knows no maximize
def test_lion_is_optimis(options):
    """Torch has no Lion; torch-optimi has one."""
    optimi = pytest.importorskip("optimi")
    ours, theirs = problem.tensors(small=True), problem.tensors(small=True)
    train(lion.optimizer(ours, lr=lion.LR, **options), ours, 5)
    train(optimi.Lion(theirs, lr=lion.LR, triton=False, **options), theirs, 5)
    close(ours, theirs)
