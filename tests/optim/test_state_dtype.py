"""States in bf16 and 8 bits: what is kept, how far a step is from fp32, checkpoints to and from fp32, resuming."""

import copy

import numpy as np
import pytest
import torch
from cases import adamw, lamb, problem, sgd
from cases.catalogue import EXACT, OPTIMIZERS, optimizers, whole
from cases.problem import same_bits, train

from pybatch import ops, optim
from pybatch.base.errors import UsageError
from pybatch.optim._engine.statistics import STATE
from pybatch.workloads.running.finding import find

pytestmark = pytest.mark.isa

NARROW = pytest.mark.parametrize("kind", ["bf16", "8bit"])
SIGNS = pytest.mark.parametrize("has_sign", [True, False])


def published(has_sign):
    """Dettmers et al. 2022's dynamic data type: the middles of 1, 2, 4 ... parts of a decade, 0 and 1."""
    sizes = [0.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (not has_sign)) + 1)
        sizes += [10.0 ** (decade - 6) * middle for middle in (edges[1:] + edges[:-1]) / 2]
    if has_sign:
        return [*sizes[:-1], 1.0]  # both signs have a 1, in place of the last middle
    return [*sizes, 1.0]


def test_codes_are_the_published_ones():
    with_sign = ops.from_codes(torch.arange(256, dtype=torch.uint8), torch.ones(1), has_sign=True)
    np.testing.assert_allclose(with_sign[:128], published(True), rtol=1e-6)
    assert torch.equal(with_sign[128:], -with_sign[:128])
    without = ops.from_codes(torch.arange(256, dtype=torch.uint8), torch.ones(1), has_sign=False)
    np.testing.assert_allclose(without, published(False), rtol=1e-6)


def drawn(seed=0, count=5000):
    """Values over many decades, with whole blocks of zeros and one of tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10.0 ** (3 * torch.randn(count, generator=generator) - 3)
    values[256:512] = 0.0
    values[512:768] *= 1e-38
    return values


def kept(opt, p, name):
    """A state as the next step reads it."""
    value = opt.state[p][name]
    if value.dtype != torch.uint8:
        return value.float()
    has_sign = name not in ("exp_avg_sq", "max_exp_avg_sq")
    return ops.from_codes(value, opt.state[p][name + "_scale"], has_sign=has_sign)


@SIGNS
def test_a_value_goes_to_a_code_near_it_and_a_code_to_itself(has_sign):
    values = drawn() if has_sign else drawn().abs()
    codes, scales = ops.to_codes(values, has_sign=has_sign)
    back = ops.from_codes(codes, scales, has_sign=has_sign)
    again, same_scales = ops.to_codes(back, has_sign=has_sign)
    assert torch.equal(back, ops.from_codes(again, same_scales, has_sign=has_sign))
    scale = scales.repeat_interleave(256)[: len(values)]
    inside = values.abs() >= 1e-6 * scale
    steps = 1.0 if has_sign else 0.5  # half a part of the coarsest decade, in shares of its least value: 0.9 / 2 / 0.1
    assert ((back - values).abs() <= 4.6 * steps * values.abs())[inside].all()
    top = values.abs() >= 0.1 * scale
    assert ((back - values).abs() <= (0.5 * 0.9 / 64 * 1.01 + (0.5 * 0.9 / 64 if has_sign else 0)) * scale)[top].all()
    if not has_sign:
        assert (back > 0).equal(values > 0)


@NARROW
@optimizers(EXACT)
def test_a_step_is_that_of_fp32_and_its_states_are_rounded_once(case, kind):
    """The first step reads zeros: parameters move as with fp32 states. What is kept is near; a second step is too."""
    runs = []
    for dtype in ("fp32", kind):
        params = problem.tensors()
        opt = case.optimizer(params, lr=case.LR, max_grad_norm=50.0, state_dtype=dtype, **whole(case))
        train(opt, params, 1)
        runs.append((params, opt))
    (wide, plain), (narrow, own) = runs
    for p, q in zip(wide, narrow, strict=True):
        rule = case.optimizer._rule(plain.param_groups[0], p)
        if ops.RULES[rule.name].norms == "direction":  # its states are kept before the step reads them
            torch.testing.assert_close(q, p, rtol=0.0, atol=0.02)  # of moves by about 0.02
        else:
            assert torch.equal(p, q)
        for name, value in plain.state[p].items():
            if name in ("step", "mu_product"):
                assert torch.equal(value, own.state[q][name])
                continue
            got, size = kept(own, q, name), value.abs().max() if value.numel() else 1.0
            limit = 0.008 * value.abs() if kind == "bf16" else 0.015 * size
            assert ((got - value).abs() <= limit).all()
    before = [p.detach().clone() for p in narrow]
    train(own, narrow, 1, seed=9)
    assert not same_bits(before, narrow)


@NARROW
@optimizers(OPTIMIZERS)
def test_a_state_dict_is_fp32_and_resumes_to_the_bit(case, kind):
    runs = [problem.tensors(torch.bfloat16, small=True) for _ in range(2)]
    options = whole(case) | {"max_grad_norm": 1.0, "state_dtype": kind, "master_weights": True}
    first, again = (case.optimizer(params, lr=case.LR, **options) for params in runs)
    train(first, runs[0], 3)
    saved = copy.deepcopy(first.state_dict())
    plain = case.optimizer(problem.tensors(torch.bfloat16, small=True), lr=case.LR, master_weights=True, **whole(case))
    train(plain, plain._params(), 1)
    for own, other in zip(saved["state"].values(), plain.state_dict()["state"].values(), strict=True):
        random = {STATE, "step"} if kind == "bf16" else set()  # what the stream of random bits goes on from
        assert own.keys() - random == other.keys() - random
        assert all(value.dtype == torch.float32 for name, value in own.items() if name != STATE)
    with torch.no_grad():
        for p, q in zip(*runs, strict=True):
            q.copy_(p)
    again.load_state_dict(saved)
    train(first, runs[0], 3, seed=4)
    train(again, runs[1], 3, seed=4)
    assert same_bits(*runs)
    for p, q in zip(*runs, strict=True):
        own, other = first.state[p], again.state[q]
        assert own.keys() - {STATE} == other.keys() - {STATE}
        assert all(torch.equal(own[name], other[name]) for name in own if name != STATE)


@NARROW
def test_the_twin_loads_it_and_it_loads_the_twin(kind):
    """Layouts too: codes follow a parameter's memory, the state_dict its shape."""
    ours, theirs = problem.tensors(small=True), problem.tensors(small=True)
    opt, twin = adamw.optimizer(ours, lr=0.05, state_dtype=kind), adamw.twin(theirs, lr=0.05)
    for source, target, own, other in ((twin, opt, theirs, ours), (opt, twin, ours, theirs)):
        train(source, own, 2)
        with torch.no_grad():
            for p, q in zip(own, other, strict=True):
                q.copy_(p)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        train(target, other, 1, seed=5)
        train(source, own, 1, seed=5)
        for p, q in zip(own, other, strict=True):
            torch.testing.assert_close(p, q, rtol=0.0, atol=0.02)  # of steps of 0.05


@NARROW
def test_a_parameter_that_changes_its_layout_keeps_its_states(kind):
    p = torch.nn.Parameter(torch.randn(8, 4, 12, 12, generator=torch.Generator().manual_seed(0)))
    opt = sgd.optimizer([p], lr=0.1, momentum=0.9, state_dtype=kind)
    train(opt, [p], 2)
    before = kept(opt, p, "momentum_buffer")
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    opt._current()
    torch.testing.assert_close(kept(opt, p, "momentum_buffer"), before, rtol=0.0, atol=0.02 * float(before.abs().max()))


@NARROW
@pytest.mark.parametrize("case", [adamw, lamb], ids=["adamw", "lamb"])
def test_the_number_of_threads_changes_no_bit(case, kind):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            params = problem.tensors(torch.bfloat16)
            train(case.optimizer(params, lr=0.05, state_dtype=kind, **whole(case)), params, 3)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(*results)


@NARROW
def test_a_copy_goes_on_as_the_original(kind):
    params = problem.tensors(small=True)
    opt = adamw.optimizer(params, lr=0.05, state_dtype=kind)
    train(opt, params, 2)
    copied, others = copy.deepcopy((opt, params))
    train(opt, params, 2)
    train(copied, others, 2)
    assert same_bits(params, others)


def test_bf16_states_keep_moves_that_rounding_to_nearest_loses():
    """An average of 0.999 moves by less than half a bf16 spacing a step: its mean goes where fp32's goes."""
    p, steps = torch.nn.Parameter(torch.zeros(100_000)), 60
    opt = optim.AdamW([p], lr=0.0, betas=(0.9, 0.999), state_dtype="bf16")
    for step in range(steps):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 1.6)
        opt.step()
    wanted = 0.999 ** (steps - 1) * 0.001 + (1 - 0.999 ** (steps - 1)) * 1.6**2
    square = kept(opt, p, "exp_avg_sq").double()
    assert float(square.mean()) == pytest.approx(wanted, rel=1e-3)
    assert float(square.std()) > 0.0


def test_bytes_are_told_before_the_first_step_and_kept():
    sizes = {"fp32": 8.0, "bf16": 4.0, "8bit": 2.0 + 2 * 4 / 256}
    for kind, wanted in sizes.items():
        p = torch.nn.Parameter(torch.ones(512, 64))
        opt = optim.AdamW([p], state_dtype=kind)
        assert opt.state_bytes / p.numel() == wanted
        p.grad = torch.ones_like(p)
        opt.step()
        held = [value for name, value in opt.state[p].items() if name != "step"]
        assert sum(value.numel() * value.element_size() for value in held) == opt.state_bytes
    half = torch.nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
    assert optim.Lion([half], state_dtype="8bit", master_weights="remainder").state_bytes == 256 * 3 + 4


def test_what_can_not_be_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UsageError, match="state_dtype 'int8' is not known"):
        optim.AdamW([p], state_dtype="int8")
    with pytest.raises(UsageError, match=r"state_dtype torch.float16 is not known. Use 'fp32', 'bf16' or '8bit'"):
        optim.AdamW([p], state_dtype=torch.float16)


def test_a_dtype_of_torch_names_the_same():
    """Also where others ask for the option."""
    p = torch.nn.Parameter(torch.ones(300))
    p.grad = torch.ones_like(p)
    for given, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        opt = optim.AdamW([p], state_dtype=given)
        opt.step()
        assert opt._options.state_dtype == name
        assert opt.state[p]["exp_avg"].dtype == given


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_with_an_infinity_is_no_number(bad):
    """Its 255 neighbours share its scale. Where a verdict is taken, none of it comes here."""
    p = torch.nn.Parameter(torch.zeros(600))
    opt = sgd.optimizer([p], lr=0.1, momentum=0.9, state_dtype="8bit")
    p.grad = torch.ones_like(p)
    p.grad[300] = bad
    opt.step()
    assert kept(opt, p, "momentum_buffer").isnan().equal((torch.arange(600) // 256) == 1)


def test_training_ends_where_fp32_states_end():
    """On digits, from the same weights and batches: far within what two seeds differ by."""
    workload = find("digits")

    def final(kind, seed):
        torch.manual_seed(seed)
        model, generator = workload.model(), torch.Generator().manual_seed(seed)
        opt = optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0, state_dtype=kind)
        for _ in range(60):
            workload.loss(model, workload.batch(32, generator)).backward()
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            return float(workload.loss(model, workload.batch(256, torch.Generator().manual_seed(0), "test")))

    losses = {kind: np.array([final(kind, seed) for seed in range(4)]) for kind in ops.STATE_TYPES}
    spread = losses["fp32"].std(ddof=1)
    for kind in ("bf16", "8bit"):
        assert np.abs(losses[kind] - losses["fp32"]).max() < 0.3 * spread
        assert (losses[kind] != losses["fp32"]).any()
