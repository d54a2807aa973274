"""16-bit parameters: masters and remainders follow an fp32 run to the bit, stochastic rounding is unbiased."""

import copy

import numpy as np
import pytest
import torch
from cases import lion, muon, problem, sgd
from cases.catalogue import EXACT, OPTIMIZERS, optimizers, whole
from cases.problem import same_bits

pytestmark = pytest.mark.isa

NARROW = [dtype for dtype in problem.DTYPES if dtype != torch.float32]
MASTERS = [(True, dtype) for dtype in NARROW] + [("remainder", torch.bfloat16)]
KINDS = [{"master_weights": True}, {"master_weights": "remainder"}, {"stochastic_rounding": 5}]
SPACING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the numbers from 0.5 to 1


def step_both(opt, params, others_opt, others, generator, scale=1.0):
    """One step of two optimizers on the same values; the gradients are in each parameter's own dtype."""
    problem.give_gradients(params, generator, scale)
    for p, q in zip(params, others, strict=True):
        q.grad = torch.empty_like(q).copy_(p.grad)
    opt.step()
    others_opt.step()


@optimizers(OPTIMIZERS)
@pytest.mark.parametrize(("kind", "dtype"), MASTERS, ids=str)
@pytest.mark.parametrize("clip", [None, 50.0])
def test_masters_are_what_an_fp32_run_gives_to_the_bit(case, kind, dtype, clip):
    options = whole(case)
    params = problem.tensors(dtype)
    wide = [torch.nn.Parameter(torch.empty_like(p, dtype=torch.float32).copy_(p)) for p in params]
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=clip, master_weights=kind, **options)
    wide_opt = case.optimizer(wide, lr=case.LR, max_grad_norm=clip, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        step_both(opt, params, wide_opt, wide, generator)
    for p, q in zip(params, wide, strict=True):
        if kind == "remainder":
            assert torch.equal(joined(p, opt.state[p]["remainder"]), q)
        else:
            assert torch.equal(opt.state[p]["master"], q)
            assert torch.equal(p, q.to(dtype))


def joined(high, low):
    """fp32 values of bf16 tensors and their signed 16-bit remainders."""
    bits = high.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    return (bits + low.contiguous().view(torch.int16).to(torch.int32)).view(torch.float32)


@optimizers(EXACT)
def test_masters_keep_moves_that_plain_storage_loses(case):
    """A run of small steps: with masters it ends where float64 does, without them nothing moves."""
    moved = {}
    for kind in (False, True):
        p = torch.nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
        options = {"trust_coefficient": 1.0} if case.__name__.endswith("lars") else {}
        opt = case.optimizer([p], lr=1e-4, weight_decay=0.0, master_weights=kind, **options)
        wanted, state = np.ones((64, 64)), {}
        for _ in range(100):
            p.grad = torch.full_like(p, 0.5)
            opt.step()
            wanted = case.reference(wanted, np.full((64, 64), 0.5), state, 1e-4, weight_decay=0.0, **options)
        moved[kind] = problem.double(p) - 1.0
        if kind:
            # fp32 below 1 rounds every step by at most 2^-25.
            np.testing.assert_allclose(problem.double(opt.state[p]["master"]), wanted, rtol=0.0, atol=100 * 2.0**-25)
    assert np.all(moved[True] < -0.003)
    assert np.all(moved[False] == 0.0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_one_stochastic_step_is_unbiased_and_stays_between_two_neighbours(dtype):
    """200 000 elements at a quarter of the way between two values: the share of the upper one is a binomial."""
    n, spacing = 200_000, SPACING[dtype]
    p = torch.nn.Parameter(torch.full((n,), 0.75, dtype=dtype))
    opt = sgd.optimizer([p], lr=0.25 * spacing, stochastic_rounding=7)
    p.grad = torch.full_like(p, -1.0)
    opt.step()
    values, counts = p.detach().float().unique(return_counts=True)
    assert values.tolist() == [0.75, 0.75 + spacing]
    share = counts[1].item() / n
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@optimizers(EXACT)
def test_stochastic_rounding_moves_the_mean_as_fp32_does(case, dtype):
    """Steps of a few per cent of the spacing, which rounding to nearest loses entirely."""
    rate, steps = 0.02 * SPACING[dtype], 40
    options = {"weight_decay": 0.0} | ({"skip": True} if "skip" in case.VARIANTS[-1] else {})
    if case.__name__.endswith(("sgd", "lars")):
        options["momentum"] = 0.0
    ends = {}
    for kind in ("plain", "stochastic", "fp32"):
        p = torch.nn.Parameter(torch.full((100_000,), 0.75, dtype=torch.float32 if kind == "fp32" else dtype))
        opt = case.optimizer([p], lr=rate, stochastic_rounding=3 if kind == "stochastic" else False, **options)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            opt.step()
        ends[kind] = problem.double(p)
    assert np.all(ends["plain"] == 0.75)
    # Each step adds at most rate * spacing of variance.
    sigma = (steps * rate * SPACING[dtype] / 100_000) ** 0.5
    moved = ends["fp32"].mean() - 0.75
    assert abs(moved) > 20 * sigma
    assert abs(ends["stochastic"].mean() - ends["fp32"].mean()) < 4 * sigma


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_bits_depend_on_seed_tensor_and_step_alone(dtype):
    def run(seed, threads):
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(torch.full((40_000,), 0.75, dtype=dtype)) for _ in range(2)]
        opt = lion.optimizer(params, lr=0.3 * SPACING[dtype], stochastic_rounding=seed)
        first = []
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
            first.append([p.detach().clone() for p in params])
        return first

    threads = torch.get_num_threads()
    try:
        a, again, other = run(1, 1), run(1, 2), run(2, 2)
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(a, again, other, strict=True):
        assert same_bits(one, two)
        assert not same_bits(one, three)
        assert not torch.equal(one[0], one[1])  # two tensors in the same place
    moved = a[0][0] != 0.75
    assert abs(moved.float().mean().item() - 0.3) < 0.02
    # The second step's bits are new ones: those that moved in the first move no more often.
    assert abs((a[1][0] != a[0][0])[moved].float().mean().item() - 0.3) < 0.03


def kept(opt, params):
    """Copies of all masters and remainders."""
    states = [opt.state[p] for p in params]
    return [state[name].clone() for state in states for name in ("master", "remainder") if name in state]


@optimizers(OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_non_finite_step_leaves_masters_and_parameters(case, kind):
    params = problem.tensors(torch.bfloat16, small=True)
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=1.0, **kind)
    problem.train(opt, params, 2)
    before = [p.detach().clone() for p in params]
    masters = kept(opt, params)
    problem.give_gradients(params, torch.Generator().manual_seed(0))
    params[4].grad[3] = float("nan")
    opt.step()
    assert same_bits(before, params)
    assert same_bits(masters, kept(opt, params))
    assert len(masters) == (0 if "stochastic_rounding" in kind else len(params))
    assert opt.skipped == 1


@optimizers(OPTIMIZERS)
@pytest.mark.parametrize("kind", [{}, *KINDS], ids=str)
def test_a_state_dict_goes_on_to_the_bit(case, kind):
    """Moments, masters, the stream of random bits and LARS's carried norms."""
    runs = [problem.tensors(torch.bfloat16, small=True) for _ in range(2)]
    options = whole(case)
    first, again = (case.optimizer(params, lr=case.LR, max_grad_norm=1.0, **options, **kind) for params in runs)
    problem.train(first, runs[0], 3)
    with torch.no_grad():
        for p, q in zip(*runs, strict=True):
            q.copy_(p)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    problem.train(first, runs[0], 3, seed=4)
    problem.train(again, runs[1], 3, seed=4)
    assert same_bits(*runs)
    assert same_bits(kept(first, runs[0]), kept(again, runs[1]))


def test_muon_moves_narrow_matrices_by_stochastic_rounding_too():
    p = torch.nn.Parameter(torch.full((64, 64), 0.75, dtype=torch.bfloat16))
    opt = muon.optimizer([p], lr=0.02 * SPACING[torch.bfloat16], weight_decay=0.0, stochastic_rounding=True)
    generator = torch.Generator().manual_seed(0)
    p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
    opt.step()
    values = p.detach().float().unique()
    assert len(values) > 1
    assert float((values - 0.75).abs().max()) <= SPACING[torch.bfloat16]
