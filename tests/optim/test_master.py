"""Masters and remainders: what others write to a parameter is followed, and state dictionaries carry them."""

import copy
import pickle

import pytest
import torch
from cases import adamw, problem, sgd

from pybatch import optim
from pybatch.base.errors import UsageError

KINDS = [(torch.bfloat16, True), (torch.bfloat16, "remainder"), (torch.float16, True)]
kinds = pytest.mark.parametrize(("dtype", "master"), KINDS, ids=str)


def train(opt, params, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        problem.give_gradients(params, generator)
        opt.step()


def value(opt, p):
    """The fp32 master of a parameter, whichever way it is kept."""
    state = opt.state[p]
    if "master" in state:
        return state["master"].clone()
    high = p.detach().view(torch.int16).to(torch.int32)
    return ((high << 16) + state["remainder"].to(torch.int32)).view(torch.float32)


def simple(dtype, size=257):
    return torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype))


@kinds
def test_the_parameter_is_the_rounding_of_its_master(dtype, master):
    params = [simple(dtype)]
    opt = adamw.optimizer(params, lr=1e-3, master_weights=master)
    train(opt, params, 20)
    full = value(opt, params[0])
    assert torch.equal(full.to(dtype), params[0].detach())
    assert not torch.equal(full, params[0].detach().float())


@kinds
def test_small_updates_are_not_lost(dtype, master):
    """Each is below half a unit of the parameter's last place; together they are 10 of them."""
    p = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    eps = torch.finfo(dtype).eps
    opt = sgd.optimizer([p], lr=0.1 * eps, master_weights=master)
    plain = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    lost = sgd.optimizer([plain], lr=0.1 * eps)
    for _ in range(100):
        p.grad = plain.grad = -torch.ones(5, dtype=dtype)
        opt.step()
        lost.step()
    assert torch.equal(p.detach(), torch.full((5,), 1 + 10 * eps, dtype=dtype))
    assert torch.equal(plain.detach(), torch.ones(5, dtype=dtype))


@kinds
@pytest.mark.parametrize(
    "write",
    [
        lambda p, new: p.copy_(new),
        lambda p, new: p.detach().copy_(new),
        lambda p, new: torch.nn.ParameterList([p]).load_state_dict({"0": new}),
        lambda p, new: setattr(p, "data", new.clone()),
    ],
    ids=["copy", "detached", "load_state_dict", "data"],
)
def test_weights_written_by_others_are_not_undone(dtype, master, write):
    p = simple(dtype)
    opt = sgd.optimizer([p], lr=1e-3, master_weights=master)
    train(opt, [p], 5)
    new = torch.full_like(p.detach(), 3.0)
    with torch.no_grad():
        write(p, new)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p.detach(), new)
    p.grad = torch.ones_like(p)
    opt.step()
    gap = value(opt, p) - (3.0 - 1e-3)
    limit = 1e-6 if master is True else torch.finfo(dtype).eps  # a remainder is not counted out by a swap of .data
    assert float(gap.abs().max()) < limit


def test_only_what_was_written_is_taken_anew():
    p = simple(torch.bfloat16)
    opt = sgd.optimizer([p], lr=1e-4, master_weights=True)
    train(opt, [p], 5)
    before = value(opt, p)
    with torch.no_grad():
        p[7] = 5.0
    p.grad = torch.zeros_like(p)
    opt.step()
    after = value(opt, p)
    assert float(after[7]) == 5.0
    before[7] = 5.0
    assert torch.equal(after, before)


@kinds
@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), "state_dict"],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_a_copy_goes_on_to_the_bit(dtype, master, copier):
    params = problem.tensors(dtype, small=True)
    opt = adamw.optimizer(params, lr=1e-3, master_weights=master)
    train(opt, params, 3)
    if copier == "state_dict":
        others = copy.deepcopy(params)
        copied = adamw.optimizer(others, lr=9.0, master_weights=master)
        copied.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        copied, others = copier((opt, params))
    train(opt, params, 3, seed=5)
    train(copied, others, 3, seed=5)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(value(opt, p), value(copied, q))


@kinds
def test_the_twin_loads_it_and_gives_it_back(dtype, master):
    params = [simple(dtype)]
    opt = adamw.optimizer(params, lr=1e-3, master_weights=master)
    train(opt, params, 3)
    twin = adamw.twin(params, lr=1e-3)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(twin, params, 1)
    fresh = adamw.optimizer(params, lr=1e-3, master_weights=master)
    state = twin.state_dict()
    state["state"][0] = {k: v for k, v in state["state"][0].items() if k not in ("master", "remainder")}
    fresh.load_state_dict(state)
    now = params[0].detach().float()
    params[0].grad = torch.zeros_like(params[0])
    for group in fresh.param_groups:
        group["lr"] = 0.0
    fresh.step()
    assert torch.equal(value(fresh, params[0]), now)


def test_a_remainder_follows_a_write_that_comes_with_a_new_gradient():
    """The table is made anew then, and must not lose sight of the write."""
    p, late = simple(torch.bfloat16), simple(torch.bfloat16)
    opt = sgd.optimizer([p, late], lr=1e-4, master_weights="remainder")
    train(opt, [p], 5)
    assert opt.state[p]["remainder"].any()
    with torch.no_grad():
        p.fill_(3.0)
    p.grad, late.grad = torch.zeros_like(p), torch.zeros_like(late)
    opt.step()
    assert torch.equal(value(opt, p), torch.full((257,), 3.0))


def test_remainder_of_fp16_is_refused():
    p = simple(torch.float16)
    opt = sgd.optimizer([p], master_weights="remainder")
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(UsageError, match=r"parameter 0 of shape \(257,\) is torch.float16.*master_weights=True"):
        opt.step()
    assert torch.equal(p.detach(), before)
    assert not opt.state.get(p)


def test_fp32_parameters_need_no_master():
    p = simple(torch.float32)
    opt = sgd.optimizer([p], master_weights=True)
    train(opt, [p], 1)
    assert dict(opt.state[p]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_weights": "half"}, "'half' is not known"),
        ({"stochastic_rounding": -1}, "seed from 0"),
        ({"stochastic_rounding": 0.5}, "seed from 0"),
        ({"master_weights": True, "stochastic_rounding": 0}, "Leave one out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        optim.SGD([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_stochastic_rounding_goes_on_from_a_state_dict_and_another_seed_differs(kind):
    ends = []
    for seed, interrupted in ((3, False), (3, True), (4, False)):
        p = simple(torch.bfloat16)
        opt = kind([p], lr=1e-3, stochastic_rounding=seed)
        train(opt, [p], 4)
        if interrupted:
            state = copy.deepcopy(opt.state_dict())
            opt = kind([p], lr=1e-3, stochastic_rounding=99)
            opt.load_state_dict(state)
        train(opt, [p], 4, seed=5)
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_norms_carried_from_step_to_step_follow_what_others_write():
    """LARS keeps |p|^2 from its own update: a parameter written in between must not keep the old one."""
    runs = []
    for fresh in (False, True):
        p = torch.nn.Parameter(torch.ones(20, 3))
        opt = optim.LARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.1)
        p.grad = torch.ones(20, 3)
        opt.step()
        with torch.no_grad():
            p.fill_(50.0)
        if fresh:
            opt = optim.LARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.1)
        p.grad = torch.ones(20, 3)
        opt.step()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)
