"""Every fused optimizer against its float64 reference and its torch twin, over the tables in tests/cases."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import adamw, problem, sgd

from pybatch import _C
from pybatch.errors import UsageError

CASES = [(case, options) for case in (adamw, sgd) for options in case.VARIANTS]
each_case = pytest.mark.parametrize(("case", "options"), CASES, ids=lambda x: getattr(x, "__name__", None) or str(x))
each_optimizer = pytest.mark.parametrize("case", [adamw, sgd], ids=["adamw", "sgd"])


@each_case
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 50.0])  # the norm is about 220
def test_matches_float64_reference(case, options, dtype, clip):
    params = problem.tensors(dtype)
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=clip, **options)
    result = problem.follow(params, options, case.reference, case.LR, clip=clip, optimizer=opt)
    problem.assert_follows(result, dtype)


@pytest.fixture
def narrower():
    """Leaves the vector width as it found it."""
    width = _C.cpu_width()
    yield _C.set_cpu_width
    _C.set_cpu_width(width)


@pytest.mark.parametrize("width", _C.cpu_widths())
@each_optimizer
def test_every_vector_width_matches_the_reference(narrower, width, case):
    narrower(width)
    for dtype in problem.DTYPES:
        params = problem.tensors(dtype)
        opt = case.optimizer(params, lr=case.LR, max_grad_norm=50.0)
        result = problem.follow(params, {}, case.reference, case.LR, clip=50.0, optimizer=opt)
        problem.assert_follows(result, dtype)


def test_a_width_this_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match="width 'avx1024'"):
        _C.set_cpu_width("avx1024")


@each_optimizer
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
def test_a_step_that_does_nothing_fails_the_same_check(case, dtype):
    result = problem.follow(problem.tensors(dtype), {}, case.reference, case.LR, optimizer=None)
    with pytest.raises(AssertionError):
        problem.assert_follows(result, dtype)


@pytest.mark.parametrize(
    ("case", "wrong", "options"),
    [(case, wrong, options) for case in (adamw, sgd) for wrong, options in case.WRONG],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
def test_a_wrong_rule_fails_the_same_check(case, wrong, options, dtype):
    params = problem.tensors(dtype)
    opt = case.optimizer(params, lr=case.LR, **options)
    result = problem.follow(params, options, wrong, case.LR, optimizer=opt)
    with pytest.raises(AssertionError):
        problem.assert_follows(result, dtype)


def train(opt, params, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        problem.give_gradients(params, generator)
        opt.step()
        opt.zero_grad()


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_optimizer
def test_two_runs_and_any_number_of_threads_give_the_same_bits(case):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            params = problem.tensors()
            opt = case.optimizer(params, lr=case.LR, max_grad_norm=1.0)
            train(opt, params, 4)
            results.append(([p.detach().clone() for p in params], float(opt.grad_norm)))
    finally:
        torch.set_num_threads(threads)
    for params, norm in results[1:]:
        assert same_bits(params, results[0][0])
        assert norm == results[0][1]


def close(params, others, rtol=2e-5):
    for p, q in zip(params, others, strict=True):
        np.testing.assert_allclose(problem.double(p), problem.double(q), rtol=rtol, atol=rtol)


@each_case
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
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(case, copier):
    params = problem.tensors(small=True)
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=1.0)
    train(opt, params, 2)
    copied, others = copier((opt, params))
    train(opt, params, 2)
    train(copied, others, 2)
    assert same_bits(params, others)


def test_narrow_parameters_keep_fp32_state_through_a_state_dict():
    params = problem.tensors(torch.bfloat16, small=True)
    opt = adamw.optimizer(params, lr=adamw.LR)
    train(opt, params, 2)
    again = adamw.optimizer(params, lr=adamw.LR)
    again.load_state_dict(opt.state_dict())
    train(again, params, 1)
    for p in params:
        assert again.state[p]["exp_avg"].dtype == torch.float32


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


@each_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(case, bad, where):
    params = problem.tensors()
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=1.0)
    train(opt, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict()["state"])
    problem.give_gradients(params, torch.Generator().manual_seed(0))
    params[5].grad[where] = bad
    opt.step()
    assert same_bits(before, params)
    for index, tensors in opt.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in tensors.items())
    assert opt.skipped == 1
    train(opt, params, 1)
    assert opt.skipped == 1
    assert not same_bits(before, params)


def test_huge_finite_gradients_are_not_taken_for_non_finite():
    p = torch.nn.Parameter(torch.zeros(100))
    opt = sgd.optimizer([p], lr=1.0, max_grad_norm=1.0)
    p.grad = torch.full((100,), 1e30)  # squares overflow fp32
    opt.step()
    assert opt.skipped == 0
    np.testing.assert_allclose(float(opt.grad_norm), 1e31, rtol=1e-6)
    np.testing.assert_allclose(problem.double(p), -0.1, rtol=1e-5)


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


def test_grad_scaler_with_clipping_clips_the_unscaled_gradient():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = sgd.optimizer([p], lr=1.0, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale((p * 0.1).sum()).backward()
    scaler.step(opt)
    np.testing.assert_allclose(float(opt.grad_norm), 0.2, rtol=1e-6)
    np.testing.assert_allclose(problem.double(p), -0.1, rtol=1e-6)


BAD_ARGUMENTS = [
    (adamw, {"lr": -1.0}, "lr -1.0"),
    (adamw, {"betas": (0.9, 1.0)}, "betas"),
    (adamw, {"eps": -1e-8}, "eps"),
    (adamw, {"weight_decay": float("nan")}, "weight_decay nan"),
    (adamw, {"lr": torch.ones(2)}, "one number"),
    (adamw, {"max_grad_norm": 0.0}, "max_grad_norm 0.0"),
    (adamw, {"backend": "cudda"}, "cudda.*cpp, cuda, triton"),
    (adamw, {"differentiable": True}, "torch.optim twin"),
    (sgd, {"momentum": -0.1}, "momentum -0.1"),
    (sgd, {"nesterov": True}, "Nesterov needs"),
]


@pytest.mark.parametrize(("case", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(case, options, message):
    with pytest.raises(UsageError, match=message):
        case.optimizer([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), r"parameter 1 of shape \(2,\) is torch.complex64"),
        (torch.ones(2, 3, dtype=torch.float64), r"parameter 1 of shape \(2, 3\) is torch.float64"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(3, device="meta"), r"is on meta, the ones before it on cpu"),
    ],
)
def test_parameters_it_can_not_update_are_named_before_anything_is_written(param, message):
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(param)

    def use():
        opt = sgd.optimizer([good, bad], lr=0.1)
        good.grad = torch.ones(2)
        bad.grad = torch.ones_like(bad)
        opt.step()

    with pytest.raises(UsageError, match=message):
        use()
    assert torch.equal(good, torch.ones(2))


def test_sparse_gradient_is_named_before_anything_is_written():
    table = torch.nn.Embedding(5, 2, sparse=True)
    other = torch.nn.Parameter(torch.ones(2))
    opt = sgd.optimizer([other, table.weight], lr=0.1)
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(UsageError, match=r"gradient of parameter 1 of shape \(5, 2\) has layout torch.sparse_coo"):
        opt.step()
    assert torch.equal(other, torch.ones(2))


def test_state_of_another_shape_is_refused():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    opt = adamw.optimizer([p])
    p.grad = torch.ones(2)
    opt.step()
    other = adamw.optimizer([q])
    other.load_state_dict(opt.state_dict())
    q.grad = torch.ones(3)
    with pytest.raises(UsageError, match=r"state 'exp_avg' of parameter 0 has shape \(2,\)"):
        other.step()
    assert torch.equal(q, torch.ones(3))
