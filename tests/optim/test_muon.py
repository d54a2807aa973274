"""Muon: Newton-Schulz against float64, the optimizer against float64 and torch's twin, and its two kinds of groups."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import muon, problem
from cases.catalogue import variants, wrong_rules
from cases.problem import same_bits, train

from pybatch.base.errors import UsageError
from pybatch.optim import AdamW, Muon
from pybatch.optim._engine import newton_schulz


def matrices(dtype=torch.float32):
    """Several of one shape, tall, wide, transposed in memory, with gaps, misaligned, a row, a column, an empty one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    made = [draw(12, 20), draw(12, 20), draw(20, 12), draw(40, 12).t(), draw(12, 40)[:, ::2], draw(1, 9), draw(9, 1)]
    made += [draw(241)[1:].view(12, 20), draw(64, 32), draw(0, 4)]
    return [torch.nn.Parameter(tensor) for tensor in made]


def assert_follows(result, dtype):
    """As problem.assert_follows, with the noise of bf16 products: over all matrices, and for the worst element."""
    error, movement, share = result
    unit = 4 * torch.finfo(dtype).eps
    assert movement > unit
    assert error <= 0.2 * movement + 2 * unit
    assert share < muon.NOISE + (0.0 if dtype == torch.float32 else 0.02)


@variants([muon])
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 10.0])  # the norm is about 60
def test_matches_float64_reference(case, options, dtype, clip):
    params = [*matrices(dtype), *problem.tensors(dtype, small=True)]
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=clip, **options)
    result = problem.follow(params, options, case.reference, case.LR, clip=clip, optimizer=opt)
    assert_follows(result, dtype)


def test_a_step_that_does_nothing_fails_the_same_check():
    with pytest.raises(AssertionError):
        assert_follows(problem.follow(matrices(), {}, muon.reference, muon.LR), torch.float32)


@wrong_rules([muon])
def test_a_wrong_rule_fails_the_same_check(case, wrong, options):
    params = matrices()
    opt = case.optimizer(params, lr=case.LR, **options)
    result = problem.follow(params, options, wrong, case.LR, optimizer=opt)
    with pytest.raises(AssertionError):
        assert_follows(result, torch.float32)


def spread(*shape, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 7), (7, 1), (1, 1)], ids=str)
def test_newton_schulz_is_the_iteration_in_float64(shape):
    made = spread(*shape)
    wanted = [muon.orthogonal(problem.double(x), newton_schulz.COEFFICIENTS, newton_schulz.STEPS) for x in made]
    newton_schulz.orthogonalize(list(made))
    for x, w in zip(made, wanted, strict=True):
        assert np.abs(problem.double(x) - w).sum() < muon.NOISE * np.abs(w).sum()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_newton_schulz_leaves_the_directions_and_evens_out_the_lengths(shape):
    x = spread(*shape, count=1)[0]
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    newton_schulz.orthogonalize([x])
    inside = u.mT @ x.double() @ v.mT
    assert 0.6 < inside.diagonal().min() <= inside.diagonal().max() < 1.25
    assert (inside - inside.diagonal().diag()).abs().max() < 0.05


def test_newton_schulz_does_not_mix_the_matrices_of_a_batch(monkeypatch):
    together, parts, alone = (list(spread(12, 20, count=5)) for _ in range(3))
    newton_schulz.orthogonalize(together)
    monkeypatch.setattr(newton_schulz, "PART", 2 * 12 * 20)
    newton_schulz.orthogonalize(parts)
    for x in alone:
        newton_schulz.orthogonalize([x])
    assert same_bits(together, parts)
    assert same_bits(together, alone)


def test_newton_schulz_of_nothing():
    newton_schulz.orthogonalize([])
    newton_schulz.orthogonalize([torch.zeros(0, 4, dtype=torch.bfloat16)])
    zero = torch.zeros(3, 4, dtype=torch.bfloat16)
    newton_schulz.orthogonalize([zero])
    assert torch.equal(zero, torch.zeros_like(zero))


def apart(params, others, start):
    """Sum of deviations over sum of movements."""
    pairs = list(zip(params, others, start, strict=True))
    moved = sum(np.abs(problem.double(q) - problem.double(s)).sum() for _, q, s in pairs)
    return sum(np.abs(problem.double(p) - problem.double(q)).sum() for p, q, _ in pairs) / moved


TWIN_OPTIONS = [options for options in muon.VARIANTS if "maximize" not in options]  # torch's has none


@pytest.mark.parametrize("options", TWIN_OPTIONS, ids=str)
def test_is_torchs_muon_on_matrices(options):
    start, ours, theirs = matrices()[:-1], matrices()[:-1], matrices()[:-1]  # torch fails on empty ones
    train(muon.optimizer(ours, lr=muon.LR, **options), ours, 5)
    train(muon.twin(theirs, lr=muon.LR, **options), theirs, 5)
    assert apart(ours, theirs, start) < 0.01


@pytest.mark.parametrize("first", ["ours", "torch"])
def test_state_dict_goes_to_the_twin_and_back_in_mid_training(first):
    a, b = matrices()[:-1], matrices()[:-1]
    kinds = [muon.optimizer, muon.twin] if first == "ours" else [muon.twin, muon.optimizer]
    a_opt = kinds[0](a, lr=muon.LR, momentum=0.8)
    train(a_opt, a, 3)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    middle = [p.detach().clone() for p in a]
    b_opt = kinds[1](b, lr=123.0)
    b_opt.load_state_dict(copy.deepcopy(a_opt.state_dict()))
    assert b_opt.param_groups[0]["lr"] == muon.LR
    train(a_opt, a, 3, seed=4)
    train(b_opt, b, 3, seed=4)
    assert apart(a, b, middle) < 0.01


SHAPES = {"embedding": (30, 8), "hidden": (16, 8), "bias": (16,), "scale": (8,), "conv": (4, 2, 3, 3), "head": (30, 8)}


def model():
    """An embedding, a hidden layer with its bias, a norm's scale, a convolution and a head."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def members(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def test_what_is_no_hidden_matrix_goes_by_adamw():
    ours, others = model(), model()
    named = ["embedding", "head"]
    rest = ["bias", "scale", "conv"]
    hidden = [p for name, p in ours.items() if name not in named]
    heads = {"params": [ours[name] for name in named], "use_muon": False, "lr": 0.01}
    opt = Muon([{"params": hidden}, heads], lr=0.05, adamw_lr=0.02, adamw_weight_decay=0.3)
    seen = [(group["use_muon"], len(group["params"]), group["lr"]) for group in opt.param_groups]
    assert seen == [(True, 1, 0.05), (False, 3, 0.02), (False, 2, 0.01)]
    groups = [{"params": [others[name] for name in names], "lr": lr} for names, lr in ((rest, 0.02), (named, 0.01))]
    alone, adamw = Muon([others["hidden"]], lr=0.05), AdamW(groups, weight_decay=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        problem.give_gradients(list(ours.values()), generator)
        for name, p in ours.items():
            others[name].grad = p.grad.clone()
        for each in (opt, alone, adamw):
            each.step()
    assert same_bits(ours.values(), others.values())


def test_a_groups_own_rate_is_muons_unless_it_says_otherwise():
    params = model()
    opt = Muon([params["embedding"]], lr=0.1, adamw_lr=0.02, adamw_weight_decay=0.0)
    opt.add_param_group({"params": [params["hidden"], params["bias"]], "lr": 0.05, "weight_decay": 0.3})
    opt.add_param_group({"params": [params["scale"]], "use_muon": False, "lr": 0.07, "eps": 1e-4})
    opt.add_param_group({"params": [params["head"]], "use_muon": False})
    names = ("use_muon", "lr", "weight_decay", "eps")
    assert [tuple(group[name] for name in names) for group in opt.param_groups] == [
        (True, 0.1, 0.1, 1e-7),
        (True, 0.05, 0.3, 1e-7),
        (False, 0.02, 0.0, 1e-8),
        (False, 0.07, 0.0, 1e-4),
        (False, 0.02, 0.0, 1e-8),
    ]


def test_schedulers_drive_both_rates():
    params = list(model().values())
    opt = Muon(params, lr=0.1, adamw_lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    train(opt, params, 1)
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.01]


def test_named_parameters_late_groups_and_a_model_without_matrices():
    params = model()
    opt = Muon([("conv", params["conv"]), ("bias", params["bias"])], lr=0.1)
    assert [group["use_muon"] for group in opt.param_groups] == [False]
    opt.add_param_group({"params": [("hidden", params["hidden"]), ("scale", params["scale"])]})
    assert [group["use_muon"] for group in opt.param_groups] == [False, True, False]
    before = [p.detach().clone() for p in params.values()]
    train(opt, list(params.values()), 2)
    for name, old in zip(params, before, strict=True):
        assert torch.equal(params[name], old) == (name in ("embedding", "head"))


def test_a_group_that_is_refused_leaves_no_half_behind():
    params = model()
    opt = Muon([params["head"]], lr=0.1)
    bad = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(UsageError, match="complex64"):
        opt.add_param_group({"params": [params["hidden"], bad]})
    assert len(opt.param_groups) == 1


def test_muon_by_name_wants_matrices():
    params = model()
    with pytest.raises(UsageError, match=r"use_muon=True with a parameter of shape \(16,\)"):
        Muon([{"params": [params["hidden"], params["bias"]], "use_muon": True}])
    with pytest.raises(UsageError, match="use_muon 1"):
        Muon([{"params": [params["hidden"]], "use_muon": 1}])


def test_a_matrix_without_gradient_stays_and_so_does_its_momentum():
    params = matrices()
    opt = Muon(params, lr=0.1)
    train(opt, params, 2)
    before, momentum = params[1].detach().clone(), opt.state[params[1]]["momentum_buffer"].clone()
    other = params[0].detach().clone()
    problem.give_gradients(params, torch.Generator().manual_seed(0))
    params[1].grad = None
    opt.step()
    assert torch.equal(params[1], before)
    assert torch.equal(opt.state[params[1]]["momentum_buffer"], momentum)
    assert not torch.equal(params[0], other)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_and_takes_new_groups(copier):
    opt = Muon(model().values(), lr=0.1, adamw_lr=0.02)
    train(opt, members(opt), 2)
    copied = copier(opt)
    train(opt, members(opt), 2)
    train(copied, members(copied), 2)
    assert same_bits(members(opt), members(copied))
    copied.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert copied.param_groups[-1]["lr"] == 0.02


def test_one_norm_clips_both_kinds():
    params = list(model().values())
    opt = Muon(params, lr=0.1, max_grad_norm=1.0)
    problem.give_gradients(params, torch.Generator().manual_seed(0))
    wanted = problem.global_norm([problem.double(p.grad) for p in params])
    opt.step()
    np.testing.assert_allclose(float(opt.grad_norm), wanted, rtol=1e-6)


def test_accumulated_micro_batches_are_orthogonalized_as_their_mean():
    runs = []
    for accumulated in (True, False):
        params = list(model().values())
        opt = Muon(params, lr=0.1, noise=accumulated)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            total = [torch.zeros_like(p) for p in params]
            for _ in range(2):
                problem.give_gradients(params, generator)
                torch._foreach_add_(total, [p.grad / 2 for p in params])
                if accumulated:
                    opt.accumulate(4)
            if not accumulated:
                for p, g in zip(params, total, strict=True):
                    p.grad = g
            opt.step()
        runs.append(params)
    assert apart(runs[0], runs[1], model().values()) < 0.01


def convolutions_and_experts():
    """Convolutions in two layouts, in one and in three dimensions, depthwise, without elements; experts."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(12, 4, 3, 3), (12, 4, 3, 3), (8, 6, 5), (10, 1, 3, 3), (4, 3, 2, 3, 3), (0, 4, 3, 3), (5, 12, 20)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[1] = made[1].to(memory_format=torch.channels_last)
    made[2] = made[2].transpose(0, 2).contiguous().transpose(0, 2)
    return [torch.nn.Parameter(tensor) for tensor in made]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("more", [{}, {"adjust_lr_fn": "match_rms_adamw", "maximize": True}], ids=str)
def test_convolutions_and_experts_match_the_float64_reference(flatten, more):
    params, options = [*convolutions_and_experts(), *matrices()], {"flatten": flatten, **more}
    opt = Muon(params, lr=muon.LR, **options)
    assert [group["use_muon"] for group in opt.param_groups] == [True]
    assert_follows(problem.follow(params, options, muon.reference, muon.LR, optimizer=opt), torch.float32)


@pytest.mark.parametrize(("flatten", "taken"), [(True, False), (False, True), (True, None)])
def test_one_way_to_make_matrices_is_not_the_other(flatten, taken):
    params = convolutions_and_experts()
    opt = Muon(params, lr=muon.LR, flatten=flatten)
    result = problem.follow(params, {"flatten": taken}, muon.reference, muon.LR, optimizer=opt)
    with pytest.raises(AssertionError):
        assert_follows(result, torch.float32)


def test_experts_are_a_loop_over_matrices_to_the_bit():
    experts = convolutions_and_experts()[-1]
    loop = [torch.nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    together, apart = Muon([experts], lr=0.1, flatten=False), Muon(loop, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        problem.give_gradients([experts], generator)
        for p, g in zip(loop, experts.grad, strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    assert same_bits(list(experts), loop)


def test_flatten_is_a_choice_of_a_group():
    params = model()
    opt = Muon([{"params": [params["conv"]], "flatten": True}, {"params": [params["hidden"]]}], lr=0.1)
    assert [(group["use_muon"], group["flatten"]) for group in opt.param_groups] == [(True, True), (True, None)]
    with pytest.raises(UsageError, match=r"shape \(4, 2, 3, 3\).*Set flatten"):
        Muon([{"params": [params["conv"]], "use_muon": True}])
    with pytest.raises(UsageError, match="flatten 'yes'"):
        Muon([params["conv"]], flatten="yes")


def test_a_group_by_dimensions_stays_one_and_is_the_split_ones():
    """With other rates for AdamW's part, which a scheduler moves alike."""
    rates = {"adamw_lr": 0.02, "adamw_weight_decay": 0.3, "adamw_eps": 1e-3}
    one, two = list(model().values()), list(model().values())
    mixed, split = Muon([{"params": one, "use_muon": None}], lr=0.1, **rates), Muon(two, lr=0.1, **rates)
    assert len(mixed.param_groups) == 1
    for opt, params in ((mixed, one), (split, two)):
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
        for step in range(3):
            train(opt, params, 1, seed=step)
            schedule.step()
    assert same_bits(one, two)
