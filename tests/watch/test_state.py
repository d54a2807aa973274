"""What steps change in a model and an optimizer is put back: the same objects, with what they held."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pybatch.watch.state import put_back

KINDS = {
    "dict": (lambda: {"n": 1}, lambda held: held.update(n=2, more=3)),
    "ordered dict": (lambda: OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda held: (held["a"].append(2), held["b"])),
    "counter": (lambda: Counter("aab"), lambda held: held.update("abc")),
    "deque": (lambda: deque([1, 2, 3], maxlen=3), lambda held: held.append(4)),
    "set": (lambda: {1, 2}, lambda held: held.add(3)),
    "bytearray": (lambda: bytearray(b"ab"), lambda held: held.extend(b"c")),
    "nested": (lambda: {"a": [{"b": deque([[1]])}]}, lambda held: held["a"][0]["b"][0].append(2)),
    "tuple": (lambda: ([1], {2}), lambda held: (held[0].append(3), held[1].clear())),
    "tensor in a list": (lambda: [torch.zeros(2)], lambda held: held[0].add_(1)),
    "tensor in nested dicts": (lambda: {"a": {"b": (torch.zeros(2),)}}, lambda held: held["a"]["b"][0].add_(1)),
    "tensor replaced": (lambda: {"ema": torch.zeros(2)}, lambda held: held.update(ema=torch.ones(2))),
    "expanded tensor": (lambda: [torch.zeros(1, 2).expand(3, 2)], lambda held: held[0][:1].add_(1)),
    "array": (lambda: [np.zeros(3)], lambda held: held[0].__iadd__(1)),
    "object": (
        lambda: SimpleNamespace(sum=0.0, seen=[]),
        lambda held: (held.seen.append(1), vars(held).update(sum=1.0)),
    ),
}


def shown(value):
    """Comparable by ==, in the order of its entries."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return type(value).__name__, [(key, shown(one)) for key, one in value.items()]
    if isinstance(value, list | tuple | deque):
        return type(value).__name__, [shown(one) for one in value]
    return shown(vars(value)) if isinstance(value, SimpleNamespace) else value


def identities(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | deque) else ()
    return [id(value), *(one for each in inside for one in identities(each))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["module", "optimizer"])
def test_what_lies_in_attributes(kind, where):
    make, change = KINDS[kind]
    model = nn.Sequential(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = make()
    if where == "module":
        model[0].own = held
    else:
        optimizer.state[model[0].weight]["own"] = held
    before, same = copy.deepcopy(shown(held)), identities(held)
    with put_back(model, [optimizer]):
        change(held)
        assert shown(held) != before
    assert shown(held) == before
    assert identities(held) == same
    if isinstance(held, deque):
        assert held.maxlen == 3


def test_what_did_not_change_leaves_no_trace_and_cycles_end():
    model = nn.Linear(2, 1)
    model.own = {"tensor": torch.zeros(2)}
    model.own["self"] = model.own
    version = model.own["tensor"]._version
    with put_back(model, []):
        pass
    assert model.own["tensor"]._version == version
    assert model.own["self"] is model.own


def test_hooks_stay_as_they_are():
    model = nn.Linear(2, 1)
    with put_back(model, []):
        model.register_forward_hook(lambda *given: None)
    assert len(model._forward_hooks) == 1
