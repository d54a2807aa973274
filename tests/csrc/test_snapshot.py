"""The compiled check of a step's tensors: every change is noticed, through DLPack's table and without it."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from pybatch import _C, ops

DTYPES = [torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


class Problem:
    """Two groups, one parameter outside the table, and states."""

    def __init__(self):
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 4), (6,), (), (0,))]
        self.other = torch.nn.Parameter(torch.zeros(2))
        self.groups = [self.params[:2], [*self.params[2:], self.other]]
        self.state = {p: {"step": torch.zeros(()), "exp_avg": torch.zeros(p.shape), "note": "x"} for p in self.params}
        self.memory = list(self.params)
        self.snapshot = ops.Snapshot(self.groups, self.memory, [self.other], self.state)

    def stands(self):
        return self.snapshot.stands(self.groups, self.memory, self.state)

    def gradients(self):
        address, dtype = (np.full(len(self.params), 7, dtype=np.int64) for _ in range(2))
        bad, count = self.snapshot.gradients(self.params, DTYPES, address, dtype)
        return bad, count, address.tolist(), dtype.tolist()


def elsewhere():
    """A parameter without elements on another device: nothing is there that an address could tell apart."""
    made = torch.nn.Parameter(torch.zeros(0, device="meta"))
    made.grad = torch.zeros(0, device="meta")
    return made


def transposed(x):
    return x.data.t()


def replace_parameter(x):
    x.groups[0][0] = torch.nn.Parameter(torch.zeros(4, 4))


def exchange(x):
    x.groups[0][0], x.groups[0][1] = x.groups[0][1], x.groups[0][0]


def set_data(index, value):
    def change(x):
        x.params[index].data = value(x.params[index])

    return change


def set_state(x):
    x.state[x.params[0]]["exp_avg"] = torch.zeros(4, 4)


def move_state(x):
    x.state[x.params[0]]["exp_avg"].data = torch.zeros(4, 4)


CHANGES = {
    "parameter replaced": replace_parameter,
    "parameters exchanged": exchange,
    "parameter added": lambda x: x.groups[0].append(torch.nn.Parameter(torch.zeros(1))),
    "group added": lambda x: x.groups.append([]),
    "memory moved": set_data(0, lambda p: p.data.clone()),
    "transposed in its memory": set_data(0, transposed),
    "shorter in its memory": set_data(1, lambda p: p.data[:3]),
    "more dimensions in its memory": set_data(1, lambda p: p.data.view(6, 1)),
    "fewer dimensions in its memory": set_data(0, lambda p: p.data.view(16)),
    "cast in its memory": set_data(1, lambda p: p.data.view(torch.int32).view(torch.bfloat16)[:6]),
    "state replaced": set_state,
    "state moved": move_state,
    "state transposed in its memory": lambda x: x.state[x.params[0]]["exp_avg"].t_(),
    "state shorter in its memory": lambda x: x.state[x.params[1]]["exp_avg"].resize_(3),
    "state of no tensor replaced": lambda x: x.state[x.params[0]].update(note="y"),
    "empty parameter on another device": lambda x: torch.utils.swap_tensors(x.params[3], elsewhere()),
    "state added": lambda x: x.state[x.params[0]].update(more=torch.zeros(1)),
    "state of another parameter": lambda x: x.state.update({x.other: {"step": torch.zeros(())}}),
    "state cleared": lambda x: x.state.clear(),
    "last state taken away": lambda x: x.state.pop(x.params[-1]),
    "tensor of the table added": lambda x: x.memory.append(torch.zeros(1)),
    "tensor of the table taken away": lambda x: x.memory.pop(),
    "group taken away": lambda x: x.groups.pop(),
    "parameter taken away": lambda x: x.groups[1].pop(),
    "gradient outside the table": lambda x: setattr(x.other, "grad", torch.zeros(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    x = Problem()
    assert x.stands()
    CHANGES[change](x)
    assert not x.stands()


def test_what_does_not_matter_is_not_taken_for_a_change():
    x = Problem()
    with torch.no_grad():
        x.params[0].fill_(3.0)
        x.params[0].grad = torch.ones(4, 4)
        x.state[x.params[0]]["exp_avg"].add_(1.0)
    assert x.stands()


def test_gradients_are_read():
    x = Problem()
    x.params[0].grad = torch.ones(4, 4)
    x.params[3].grad = torch.ones(0)
    assert x.gradients() == (-1, 2, [x.params[0].grad.data_ptr(), 0, 0, 1], [0, 7, 7, 0])
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype: gradients have their parameter's")
    x.params[0].grad_dtype = None
    x.params[0].grad = torch.ones(4, 4, dtype=torch.float16)
    assert x.gradients() == (-1, 2, [x.params[0].grad.data_ptr(), 0, 0, 1], [2, 7, 7, 0])


@pytest.mark.parametrize(
    "grad",
    [
        lambda: torch.ones(4, 4).t().contiguous().t(),
        lambda: torch._neg_view(torch.ones(4, 4)),
        lambda: torch.ones(4, 4).to_sparse(),
        lambda: torch.ones(8, 4)[::2],
    ],
    ids=["transposed", "negated", "sparse", "gaps"],
)
def test_a_gradient_that_can_not_be_read_as_it_is(grad):
    x = Problem()
    x.params[0].grad, x.params[1].grad = grad(), torch.ones(6)
    assert x.gradients() == (0, 2, [0, x.params[1].grad.data_ptr(), 0, 0], [7, 0, 7, 7])


def cast_gradient(x):
    x.params[0].grad.data = torch.ones(4, 4, dtype=torch.float64)


def move_gradient(x):
    x.params[0].grad.data = torch.ones(4, 4)


GRADIENTS = {  # a change after a step, and whether the gradient can be read then
    "replaced": (lambda x: setattr(x.params[0], "grad", torch.ones(4, 4)), True),
    "moved": (move_gradient, True),
    "negated": (lambda x: setattr(x.params[0], "grad", torch._neg_view(torch.ones(4, 4))), False),
    "negated in its memory": (lambda x: setattr(x.params[0].grad, "data", torch._neg_view(x.params[0].grad)), False),
    "transposed in its memory": (lambda x: x.params[0].grad.t_(), False),
    "shorter in its memory": (lambda x: x.params[0].grad.resize_(2, 4), False),
    "its storage moved": (lambda x: x.params[0].grad.untyped_storage().resize_(1 << 20), True),
    "cast to what no pass reads": (cast_gradient, False),
    "cast to another": (lambda x: setattr(x.params[0].grad, "data", torch.ones(4, 4, dtype=torch.bfloat16)), True),
    "its storage freed": (lambda x: x.params[0].grad.untyped_storage().resize_(0), False),
}


@pytest.mark.parametrize("change", GRADIENTS)
def test_a_change_of_a_gradient_read_before_is_noticed(change):
    x = Problem()
    x.params[0].grad = torch.ones(4, 4)
    for _ in range(2):
        assert x.gradients()[:2] == (-1, 1)
    work, readable = GRADIENTS[change]
    work(x)
    bad, _, address, dtype = x.gradients()
    assert bad == (-1 if readable else 0)
    assert address[0] == (x.params[0].grad.data_ptr() if readable else 0)
    if readable:
        assert DTYPES[dtype[0]].dtype == x.params[0].grad.dtype
    x.params[0].grad = None
    assert x.gradients() == (-1, 0, [0] * 4, [7] * 4)
    x.params[0].grad = torch.ones(4, 4)
    assert x.gradients()[2][0] == x.params[0].grad.data_ptr()


def test_this_torch_is_looked_at_by_imprints():
    """Else every tensor is asked for, and a step over many takes twice as long."""
    assert _C.imprints()
    assert _C.imprints_of_gradients()


class Halved(torch.Tensor):
    """A tensor that answers for its gradient itself."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        answer = super().__torch_function__(function, types, arguments, options or {})
        return arguments[0].own if function == torch.Tensor.grad.__get__ and answer is not None else answer


def test_a_gradient_of_a_subclass_is_what_that_says():
    p = torch.zeros(6).as_subclass(Halved).requires_grad_()
    snapshot = ops.Snapshot([[p]], [p], [], {})
    address, dtype = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    p.own = p.grad = torch.ones(6)
    assert snapshot.gradients([p], DTYPES, address, dtype) == (-1, 1)
    p.own = torch.ones(6)
    assert snapshot.gradients([p], DTYPES, address, dtype) == (-1, 1)
    assert address[0] == p.own.data_ptr()


def test_gradients_exchanged_between_parameters_are_each_others():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    snapshot = ops.Snapshot([params], params, [], {})
    address, dtype = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    for p in params:
        p.grad = torch.ones(4)
    for _ in range(3):
        assert snapshot.gradients(params, DTYPES, address, dtype) == (-1, 2)
        assert address.tolist() == [p.grad.data_ptr() for p in params]
        params[0].grad, params[1].grad = params[1].grad, params[0].grad


def test_strides_of_dimensions_of_one_element_do_not_matter():
    p = torch.nn.Parameter(torch.zeros(1, 5))
    snapshot = ops.Snapshot([[p]], [p], [], {})
    p.grad = torch.ones(5, 1).t()
    address, dtype = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    assert snapshot.gradients([p], DTYPES, address, dtype) == (-1, 1)


def test_six_dimensions_are_looked_at_too():
    """torch keeps more than five sizes apart from the tensor, where they change without it."""
    p = torch.nn.Parameter(torch.zeros(2, 2, 1, 3, 1, 1))
    p.grad = torch.ones_like(p)
    snapshot = ops.Snapshot([[p]], [p], [], {})
    address, dtype = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for _ in range(2):
        assert snapshot.stands([[p]], [p], {})
        assert snapshot.gradients([p], DTYPES, address, dtype) == (-1, 1)
    p.grad.resize_(2, 1, 2, 3, 1, 1)
    assert snapshot.gradients([p], DTYPES, address, dtype) == (0, 1)
    p.grad = torch._neg_view(torch.ones_like(p))
    assert snapshot.gradients([p], DTYPES, address, dtype) == (0, 1)
    moved = torch.zeros(2, 2, 1, 3, 1, 1)
    snapshot = ops.Snapshot([[moved]], [moved], [], {})
    assert snapshot.stands([[moved]], [moved], {})
    moved.resize_(2, 1, 2, 3, 1, 1)
    assert not snapshot.stands([[moved]], [moved], {})
    state = {p: {"exp_avg": torch.zeros(2, 2, 1, 3, 1, 1)}}
    snapshot = ops.Snapshot([[p]], [p], [], state)
    assert snapshot.stands([[p]], [p], state)
    state[p]["exp_avg"].data = torch.zeros(2, 2, 1, 3, 1, 1)
    assert not snapshot.stands([[p]], [p], state)


def test_a_last_dimension_of_one_element_taken_away_is_noticed():
    p = torch.nn.Parameter(torch.zeros(6, 1))
    snapshot = ops.Snapshot([[p]], [p], [], {})
    p.data = p.data.view(6)
    assert not snapshot.stands([[p]], [p], {})


def test_an_empty_gradient_of_another_device_is_not_read():
    x = Problem()
    x.params[3].grad = torch.ones(0)
    assert x.gradients()[:2] == (-1, 1)
    torch.utils.swap_tensors(x.params[3], elsewhere())
    assert x.gradients()[:2] == (3, 1)


def test_versions():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    seen = np.zeros(3, dtype=np.int64)
    assert ops.Snapshot.versions(params, seen) == []
    with torch.no_grad():
        params[1].add_(1.0)
        params[2].data.add_(1.0)  # torch does not count this
    assert ops.Snapshot.versions(params, seen) == [1]
    assert ops.Snapshot.versions(params, seen) == []


def test_numbers_of_the_wrong_length_are_refused():
    x = Problem()
    whole, short = np.zeros(4, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for params, address, dtype in ((x.params[:3], whole, whole), (x.params, short, whole), (x.params, whole, short)):
        with pytest.raises(ValueError, match="one item for each tensor"):
            x.snapshot.gradients(params, DTYPES, address, dtype)


WITHOUT = """
import sys, torch
del torch.Tensor.__dlpack_c_exchange_api__
from pybatch import _C
ones, torch.ones = torch.ones, None  # with which imprints are tried, once
assert not _C.imprints()
torch.ones = ones
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not without and not imprints", sys.argv[1]]))
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no table")
def test_all_of_it_without_the_table():
    """As torch before 2.10, where the tensors' methods are called, and where imprints say nothing."""
    command = [sys.executable, "-c", WITHOUT, __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_cycle_through_a_parameter_is_collected():
    x = Problem()
    x.params[0].snapshot, x.other.snapshot = x.snapshot, x.snapshot  # as a parameter that knows its optimizer
    gone = weakref.ref(x.params[0])
    del x
    gc.collect()
    assert gone() is None
