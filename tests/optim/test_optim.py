"""Every fused optimizer against its float64 reference, over the tables in tests/cases."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from cases import adam, adamw, lamb, lars, lion, muon, problem, sgd
from cases.catalogue import EXACT, OPTIMIZERS, optimizers, variants, whole, wrong_rules
from cases.problem import same_bits, train

from pybatch import _C, optim
from pybatch.base.errors import UsageError

each_optimizer = optimizers(OPTIMIZERS)


@variants(EXACT)
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


@pytest.mark.isa
@pytest.mark.parametrize("width", _C.cpu_widths())
@optimizers(EXACT)
def test_every_vector_width_matches_the_reference(narrower, width, case):
    narrower(width)
    for dtype in problem.DTYPES:
        params = problem.tensors(dtype)
        opt = case.optimizer(params, lr=case.LR, max_grad_norm=50.0, **whole(case))
        result = problem.follow(params, whole(case), case.reference, case.LR, clip=50.0, optimizer=opt)
        problem.assert_follows(result, dtype)


def test_a_width_this_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match="width 'avx1024'"):
        _C.set_cpu_width("avx1024")


@optimizers(EXACT)
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
def test_a_step_that_does_nothing_fails_the_same_check(case, dtype):
    result = problem.follow(problem.tensors(dtype), {}, case.reference, case.LR, optimizer=None)
    with pytest.raises(AssertionError):
        problem.assert_follows(result, dtype)


@wrong_rules(EXACT)
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
def test_a_wrong_rule_fails_the_same_check(case, wrong, options, dtype):
    params = problem.tensors(dtype)
    opt = case.optimizer(params, lr=case.LR, **options)
    result = problem.follow(params, options, wrong, case.LR, optimizer=opt)
    with pytest.raises(AssertionError):
        problem.assert_follows(result, dtype)


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


@pytest.mark.parametrize(("case", "options"), [(lars, {}), (lamb, {"weight_decay": 0.5})], ids=["lars", "lamb"])
def test_a_group_says_what_has_no_rate_of_its_own(case, options):
    shapes = [(4, 4), (4,), (4, 4), (4,)]
    params = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
    opt = case.optimizer(
        [{"params": params[:2]}, {"params": params[2:3], "skip": True}, {"params": params[3:], "skip": False}],
        lr=0.1,
        **options,
    )
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for p, skip in zip(params, [False, True, True, False], strict=True):
        wanted = case.reference(np.full(p.shape, 2.0), np.ones(p.shape), {}, 0.1, skip=skip, **options)
        np.testing.assert_allclose(problem.double(p), wanted, rtol=1e-6)
    assert not torch.equal(params[0][0], params[2][0])


@pytest.mark.parametrize("case", [lars, lamb], ids=["lars", "lamb"])
@pytest.mark.parametrize(("value", "slope"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ratio_is_1_where_a_norm_is_0(case, value, slope):
    p = torch.nn.Parameter(torch.full((3, 3), value))
    opt = case.optimizer([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.full_like(p, slope)
    opt.step()
    np.testing.assert_allclose(problem.double(p), value - 0.1 * slope, rtol=1e-5)


def test_norms_follow_a_parameter_that_is_changed_between_steps():
    """LARS carries |p| from one step to the next; a changed parameter must not be scaled by its old length."""
    params = [[torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)] for _ in range(2)]
    runs = [lars.optimizer(ps, lr=1.0, momentum=0.0) for ps in params]
    for step in range(3):
        for ps, opt in zip(params, runs, strict=True):
            for p in ps:
                p.grad = torch.ones_like(p)
            if step == 2:
                with torch.no_grad():
                    ps[0].mul_(100.0)
                if opt is runs[1]:  # one that starts afresh takes every norm anew
                    opt = lars.optimizer(ps, lr=1.0, momentum=0.0)
            opt.step()
    assert same_bits(params[0], params[1])


def test_lion_moves_nothing_where_the_sign_is_of_zero():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    opt = lion.optimizer([p], lr=0.5)
    p.grad = torch.tensor([1.0, 0.0, -1.0])
    opt.step()
    assert p.tolist() == [0.5, 2.0, 3.5]


@optimizers(EXACT)
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
def test_accumulated_micro_batches_are_used_as_their_mean(case, dtype):
    """Rules with norms take the mean's, which no pass over gradients has seen."""
    params, options = problem.tensors(dtype), whole(case)
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=50.0, master_weights=True, **options)
    start = [problem.double(p) for p in params]
    wanted, states = [s.copy() for s in start], [{} for _ in params]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        means = [np.zeros(p.shape) for p in params]
        for n in (4, 12):
            problem.give_gradients(params, generator)
            means = [mean + n / 16 * problem.double(p.grad) for mean, p in zip(means, params, strict=True)]
            opt.accumulate(n)
        opt.step()
        factor = min(1.0, 50.0 / (problem.global_norm(means) + 1e-6))
        for i, mean in enumerate(means):
            wanted[i] = case.reference(wanted[i], factor * mean, states[i], case.LR, **options)
    values = [opt.state[p].get("master", p) for p in params]
    error, movement, share = problem.compare(values, wanted, start)
    assert error <= 1e-5 * movement + 1e-6
    assert share < 1e-5


@each_optimizer
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_scaled_loss_gives_the_same_bits(case, accumulated):
    """The scale is a power of 2, so that no rounding differs; LARS's and Muon's norms must be unscaled too."""
    runs = []
    for scale in (None, 1024.0):
        params = problem.tensors(small=True)
        opt = case.optimizer(params, lr=case.LR, max_grad_norm=5.0, **whole(case))
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            problem.give_gradients(params, generator, scale or 1.0)
            if scale is not None:
                opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.zeros(())
            if accumulated:
                opt.accumulate(4)
            opt.step()
        runs.append([*params, opt.grad_norm])
    assert same_bits(*runs)


@each_optimizer
def test_noise_statistics_do_not_depend_on_the_rule(case):
    rings = []
    for kind in (case, sgd):
        params = problem.tensors(small=True)
        opt = kind.optimizer(params, lr=kind.LR, max_grad_norm=1.0, noise=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for n in (4, 8):
                problem.give_gradients(params, generator)
                opt.accumulate(n)
            opt.step()
        rings.append(opt.noise)
    mine, plain = rings
    assert mine.steps == 3
    assert (mine.grad_sq, mine.trace) == (plain.grad_sq, plain.trace)
    # Muon lists its parameters in another order.
    assert sorted((layer.grad_sq, layer.trace) for layer in mine.layers) == sorted(
        (layer.grad_sq, layer.trace) for layer in plain.layers
    )


BAD_ARGUMENTS = [
    (adamw, {"lr": -1.0}, "lr -1.0: it must be at least 0"),
    (adamw, {"lr": float("nan")}, "lr nan is not a number"),
    (adamw, {"betas": (0.9, 1.0)}, "betas"),
    (adamw, {"eps": -1e-8}, "eps"),
    (adamw, {"weight_decay": float("nan")}, "weight_decay nan"),
    (adamw, {"lr": torch.ones(2)}, "one number"),
    (adamw, {"max_grad_norm": 0.0}, "max_grad_norm 0.0"),
    (adamw, {"backend": "cudda"}, "cudda.*cpp, cuda, triton"),
    (adamw, {"differentiable": True}, "torch.optim twin"),
    (sgd, {"momentum": -0.1}, "momentum -0.1"),
    (sgd, {"nesterov": True}, "Nesterov needs"),
    (adam, {"betas": (-0.1, 0.9)}, r"betas \(-0.1, 0.9\)"),
    (lion, {"betas": (0.9, 1.5)}, r"usual ones are \(0.9, 0.99\)"),
    (lars, {"momentum": 0.0, "nesterov": True}, "Nesterov needs"),
    (lars, {"trust_coefficient": 0.0}, "paper's is 0.001"),
    (lars, {"eps": -1.0}, "eps -1.0"),
    (lars, {"skip": lambda p: p.dim() < 2}, "group of their own"),
    (lamb, {"max_ratio": 0.0}, "max_ratio 0.0"),
    (lamb, {"skip": 1}, "skip 1"),
    (muon, {"adjust_lr_fn": "rms"}, "adjust_lr_fn 'rms'.*match_rms_adamw"),
    (muon, {"ns_coefficients": (3.0, -3.2)}, "there are three"),
    (muon, {"ns_steps": 100}, "ns_steps 100"),
    (muon, {"momentum": -1.0}, "momentum -1.0"),
    (muon, {"adamw_betas": (0.9, 2.0)}, "betas"),
    (muon, {"adamw_eps": -1.0}, "eps -1.0"),
]


@pytest.mark.parametrize(("case", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(case, options, message):
    with pytest.raises(UsageError, match=message):
        case.optimizer([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2))], **options)


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


@pytest.mark.parametrize("name", sorted(set(optim.__all__) - {"FusedOptimizer"}))
def test_the_signature_shows_every_keyword(name):
    """As trainers ask for it: 'fused' in inspect.signature(cls).parameters."""
    cls = getattr(optim, name)
    shown = inspect.signature(cls).parameters
    assert {"max_grad_norm", "noise", "master_weights", "stochastic_rounding", "backend", "fused", "foreach"} <= set(
        shown
    )
    if (twin := getattr(torch.optim, name, None)) is not None:
        ours = [p.name for p in shown.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        theirs = [p.name for p in inspect.signature(twin).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert ours == theirs
    made = cls(
        [torch.zeros(2, 2, requires_grad=True)], **{k: v.default for k, v in shown.items() if v.kind == v.KEYWORD_ONLY}
    )
    assert made.param_groups
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'max_norm'"):
        cls([torch.zeros(2, 2, requires_grad=True)], max_norm=1.0)
