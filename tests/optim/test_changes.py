"""What a user may replace between two steps, parameters, their memory, states, and what is refused without memory."""

import copy

import numpy as np
import pytest
import torch
from cases import adamw, problem, sgd
from torch.testing._internal.two_tensor import TwoTensor

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine import statistics

both = pytest.mark.parametrize("case", [adamw, sgd], ids=["adamw", "sgd"])


def param(*values):
    return torch.nn.Parameter(torch.tensor(values))


def like_the_twin(case, change, lr=0.1, **options):
    """Three steps, `change(opt, params)`, three steps: ours and torch's end alike."""
    runs = []
    for kind in (case.optimizer, case.twin):
        params = [param(1.0, 2.0, 3.0, 4.0), param(5.0, 6.0)]
        opt = kind([{"params": [p], "lr": lr * (i + 1)} for i, p in enumerate(params)], **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            if step == 3:
                params = change(opt, params) or params
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        np.testing.assert_allclose(problem.double(p), problem.double(q), rtol=2e-5, atol=2e-5)


@both
def test_a_parameter_replaced_in_its_group_is_trained(case):
    def replace(opt, params):
        new = param(-1.0, -2.0, -3.0, -4.0, -5.0)
        opt.param_groups[0]["params"][0] = new
        opt.state.pop(params[0], None)
        return [new, params[1]]

    like_the_twin(case, replace)


@both
def test_parameters_exchanged_between_groups_take_the_new_options(case):
    def exchange(opt, params):
        first, second = opt.param_groups
        first["params"], second["params"] = second["params"], first["params"]

    like_the_twin(case, exchange)


def test_memory_beyond_a_shrunken_parameter_is_not_written():
    base = torch.zeros(40000)
    p = torch.nn.Parameter(base)
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.ones(40000)
    opt.step()
    p.grad = None
    p.data = p.data[:4]
    p.grad = torch.ones(4)
    opt.step()
    assert torch.equal(base[:4], torch.full((4,), -2.0))
    assert torch.equal(base[4:], torch.full((39996,), -1.0))


@pytest.mark.parametrize("shape", [(2, 3), (3, 3)])
def test_a_parameter_transposed_in_place_keeps_its_elements_apart(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.zeros(shape)
    opt.step()
    p.grad = None
    p.data = p.data.t()
    p.grad = torch.arange(float(p.numel())).reshape(p.shape)
    opt.step()
    assert torch.equal(p.detach(), -p.grad)


def test_a_parameter_cast_in_place_is_updated_in_its_new_dtype():
    memory = torch.zeros(8)
    p = torch.nn.Parameter(memory[:4])
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.zeros(4)
    opt.step()
    p.grad = None
    p.data = memory.view(torch.bfloat16)[:4]
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    opt.step()
    assert torch.equal(p.detach(), -p.grad)
    assert torch.equal(memory[2:], torch.zeros(6))


def test_a_parameter_resized_in_mid_accumulation_is_refused():
    p = param(0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.ones(3)
    opt.accumulate(2)
    p.data = torch.zeros(5)
    p.grad = torch.ones(5)
    for _ in range(2):  # a refusal is not forgotten by the next call
        with pytest.raises(UsageError, match=r"parameter 0 had shape \(3,\) in accumulate\(\) and has \(5,\) now"):
            opt.accumulate(2)
    opt.zero_grad()
    p.grad = torch.ones(5)
    opt.step()
    assert torch.equal(p.detach(), -torch.ones(5))


def test_a_gradient_left_from_another_shape_is_refused():
    p = param(0.0, 0.0, 0.0)
    p.grad = torch.ones(3)
    opt = sgd.optimizer([p], lr=1.0)
    p.data = torch.zeros(2)
    with pytest.raises(UsageError, match=r"gradient of parameter 0 of shape \(2,\) has shape \(3,\)"):
        opt.step()


def test_a_gradient_of_fewer_dimensions_is_refused():
    p = param(0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.ones(3)
    opt.step()
    p.data = p.data.view(3, 1)  # in its memory, and with the gradient of before
    with pytest.raises(UsageError, match=r"gradient of parameter 0 of shape \(3, 1\) has shape \(3,\)"):
        opt.step()


@both
def test_states_cleared_or_replaced_are_taken(case):
    options = {"momentum": 0.9} if case is sgd else {}
    like_the_twin(case, lambda opt, params: opt.state.clear(), **options)
    name = "momentum_buffer" if case is sgd else "exp_avg"

    def replace(opt, params):
        opt.state[params[0]][name] = torch.full((4,), 7.0)

    def move(opt, params):
        opt.state[params[0]][name].data = torch.full((4,), 7.0)

    like_the_twin(case, replace, **options)
    like_the_twin(case, move, **options)


@both
def test_a_state_transposed_in_its_memory_is_taken(case):
    options, name = ({"momentum": 0.9}, "momentum_buffer") if case is sgd else ({}, "exp_avg")
    ends = []
    for kind in (case.optimizer, case.twin):
        p = torch.nn.Parameter(torch.zeros(3, 3))
        opt = kind([p], lr=0.1, **options)
        for step in range(3):
            p.grad = torch.arange(9.0).reshape(3, 3) + step
            opt.step()
            if step == 1:
                opt.state[p][name].t_()
        ends.append(problem.double(p))
    np.testing.assert_allclose(*ends, rtol=2e-5, atol=2e-5)


def test_memory_of_a_parameter_that_moved_is_given_back():
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch.zeros(1000)
    opt.step()
    storage = p.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    p.data = torch.zeros(2)
    assert users - torch._C._storage_Use_Count(storage._cdata) == 1
    other = torch.nn.Parameter(torch.zeros(1000))
    untouched = torch._C._storage_Use_Count(other.untyped_storage()._cdata)
    assert users == untouched


def test_a_graph_that_saved_the_parameter_is_refused_after_a_step():
    w, v = param(1.0, 1.0), param(1.0, 1.0)
    idle = param(1.0)
    opt = sgd.optimizer([w, v, idle], lr=1.0)
    loss = (w * v * w).sum()
    loss.backward(retain_graph=True)
    opt.step()
    assert idle._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_negated_view_as_gradient():
    p = param(0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0)
    p.grad = torch._neg_view(torch.ones(3))
    opt.step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_wrapper_subclasses_are_refused_before_anything_is_written():
    wrapped = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(UsageError, match=r"parameter 0 of shape \(3,\) is a TwoTensor"):
        sgd.optimizer([wrapped])
    plain, other = param(1.0, 1.0, 1.0), param(1.0)
    opt = sgd.optimizer([other, plain], lr=1.0)
    other.grad = torch.ones(1)
    plain.grad = TwoTensor(torch.ones(3), torch.ones(3))
    for call in (opt.step, lambda: opt.accumulate(2)):
        with pytest.raises(UsageError, match=r"gradient of parameter 1 of shape \(3,\).*TwoTensor"):
            call()
    assert torch.equal(other.detach(), torch.ones(1))


def test_tensors_without_memory_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UsageError, match="has elements but no memory"):
        sgd.optimizer([fake])


def saved_in_between(first, load):
    """Accumulate `first`, go through `load`, then two micro-batches and a step."""
    p = param(0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0, noise=True)
    p.grad = torch.full((3,), first)
    opt.accumulate(4)
    opt, p = load(opt, p)
    for value in (1.0, 2.0):
        p.grad = torch.full((3,), value)
        opt.accumulate(4)
    opt.step()
    return opt, p


def through_state_dict(opt, p):
    new = sgd.optimizer([p], lr=1.0, noise=True)
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    return new, p


def through_the_twins(opt, p):
    opt.load_state_dict(sgd.twin([p], lr=1.0).state_dict())
    return opt, p


@pytest.mark.parametrize("first", [100.0, float("nan")])
@pytest.mark.parametrize(
    "load", [through_state_dict, through_the_twins, lambda opt, p: copy.deepcopy((opt, p))], ids=["own", "twin", "copy"]
)
def test_an_accumulation_under_way_is_not_saved(first, load):
    opt, p = saved_in_between(first, load)
    assert opt.skipped == 0
    assert torch.equal(p.detach(), torch.full((3,), -1.5))
    clean, _ = saved_in_between(0.0, lambda opt, p: (opt.zero_grad(), (opt, p))[1])
    assert torch.equal(opt._ledger.ring.clone(), clean._ledger.ring)


def test_a_state_dict_holds_no_sums_of_a_step_under_way():
    p = param(0.0, 0.0)
    opt = sgd.optimizer([p], noise=True)
    p.grad = torch.full((2,), float("inf"))
    opt.accumulate(4)
    assert torch.isinf(opt._ledger.sums).any()
    ledger, *_ = statistics.unpacked(opt.state_dict()["state"][0]["noise_statistics"])
    assert not ledger.sums.any()
    kept = opt.state_dict()["state"][0]["noise_statistics"]
    assert not kept[3 : 3 + len(ledger.sums)].any()


def test_a_whole_bucket_given_as_a_view_is_not_kept():
    """DDP's gradient_as_bucket_view with one parameter in the bucket: the view has the size of the storage."""
    bucket = torch.ones(4)
    p = param(0.0, 0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0)
    for value in (1.0, 2.0, 3.0):
        bucket.fill_(value)
        p.grad = bucket.view(2, 2).view(4)
        opt.accumulate(2)
        assert torch.equal(bucket, torch.full((4,), value))
    opt.step()
    assert torch.equal(p.detach(), torch.full((4,), -2.0))


def test_a_scaler_refused_after_accumulate_leaves_no_scale_behind():
    p = param(0.0, 0.0, 0.0)
    opt = sgd.optimizer([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    opt.accumulate(4)
    with pytest.raises(UsageError, match="consumed"):
        scaler.step(opt)
    opt.zero_grad()
    p.grad = torch.ones(3)
    opt.step()
    assert torch.equal(p.detach(), -torch.ones(3))


@pytest.mark.parametrize("n", [np.int64(4), np.float32(4), torch.tensor(4), torch.tensor(4.0)], ids=repr)
def test_examples_may_be_any_number_the_host_can_read(n):
    p = param(0.0)
    opt = sgd.optimizer([p], lr=1.0)
    for count, value in ((n, 1.0), (12, 5.0)):
        p.grad = torch.full((1,), value)
        opt.accumulate(count)
    opt.step()
    assert float(p.detach()) == -4.0


def test_capturable_is_refused_on_the_cpu_as_by_the_twin():
    for kind, error in ((adamw.optimizer, UsageError), (adamw.twin, AssertionError)):
        p = param(1.0)
        opt = kind([p], capturable=True)
        p.grad = torch.ones(1)
        with pytest.raises(error, match="capturable=True"):
            opt.step()


def test_float16_where_the_compiler_has_none_says_which_has(monkeypatch):
    known = {dtype: code for dtype, code in ops.DTYPES.items() if dtype != torch.float16}
    monkeypatch.setattr(ops, "DTYPES", known)
    with pytest.raises(UsageError, match=r"only torch.float32, torch.bfloat16 can be updated.*GCC 12"):
        sgd.optimizer([torch.nn.Parameter(torch.ones(2, dtype=torch.float16))])


def test_a_momentum_that_changes_in_every_step_keeps_the_tables():
    """As OneCycleLR does; new tables are some uploads that wait, and take longer than the step."""
    p = param(1.0, 2.0)
    opt = sgd.optimizer([p], lr=0.1, momentum=0.9)
    kept = []
    for momentum in (0.9, 0.8, 0.7, 0.0, 0.5):
        opt.param_groups[0]["momentum"] = momentum
        p.grad = torch.ones(2)
        opt.step()
        kept.append(opt._tables)
    assert kept[0] is kept[1] is kept[2]
    assert kept[2] is not kept[3] is not kept[4]  # another rule
