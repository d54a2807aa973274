"""What copies and files of a model hold while it has hooks of pybatch's: its own weights, and nothing of pybatch."""

import copy
import copyreg
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import pybatch.noise
from pybatch.noise.hooks import after_forward, before_forward
from pybatch.noise.sources.micro_batches import MicroBatchNoise


class Itemwise(nn.Linear):
    """Copied item by item."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            vars(new)[name] = copy.deepcopy(value, memo)
        return new


class Stated(nn.Linear):
    def __getstate__(self):
        return vars(self) | {"stated": True}


def restored(attributes):
    new = Reduced.__new__(Reduced)
    vars(new).update(attributes["held"])
    return new


class Reduced(nn.Linear):
    """Saved by a function over its attributes, deeper than anyone looks."""

    def __reduce__(self):
        return restored, ({"held": vars(self).copy()},)


def traced():
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))


def by_attributes(model):
    """As classes that copy their attributes in one go; the weights are its own."""
    new = type(model).__new__(type(model))
    new.__dict__ = dict(vars(model))
    new._parameters = {name: nn.Parameter(p.detach().clone()) for name, p in model._parameters.items()}
    new._modules = copy.deepcopy(model._modules)
    return new


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"pybatch" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def hooked(model, called):
    return [
        before_forward(model, lambda *_: called.append("before"), with_kwargs=True),
        after_forward(model, lambda *_: called.append("after"), with_kwargs=True, always_call=True),
    ]


MODELS = {kind.__name__: lambda kind=kind: kind(3, 2) for kind in (nn.Linear, Itemwise, Stated, Reduced)}


@pytest.mark.parametrize("make", [*MODELS.values(), traced], ids=[*MODELS, "GraphModule"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_attributes])
def test_a_copy_of_a_hooked_model_has_its_own_weights(make, copied):
    """An average of weights, and its files: meanwhile, afterwards, and when the model is gone."""
    called, x = [], torch.randn(4, 3)
    model = make()
    attributes = list(vars(model))
    placed = hooked(model, called)
    assert list(vars(model)) == attributes
    assert torch.equal(saved(model)(x), model(x))
    assert called == ["before", "after"]
    average = copied(model)
    with torch.no_grad():
        for p in average.parameters():
            p.zero_()

    def check():
        files = [saved(average), pickle.loads(pickle.dumps(average)), copy.deepcopy(average), copy.copy(average)]
        for one in files:
            assert [*one.state_dict()] == [*average.state_dict()]
            assert not any(p.any() for p in one.parameters())
        for one in files[:-1] if copied is copy.deepcopy else ():
            assert not one(x).any()

    check()
    for one in placed:
        one.remove()
    assert list(vars(model)) == attributes
    assert not any(vars(model)[name] for name in attributes if "forward" in name)
    check()
    del model, placed
    gc.collect()
    check()
    assert called == ["before", "after"]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved])
@pytest.mark.parametrize("make", [nn.Linear, Stated])
def test_ordinary_copies_have_no_hook_and_the_scripts_own_ones(make, copied):
    model = nn.Sequential(make(3, 2))
    model[0].register_forward_hook(str, always_call=True)
    placed = hooked(model[0], [])
    again = copied(model)[0] if copied is not copy.copy else copied(model[0])
    own = [list(vars(again)[name].values()) for name in vars(again) if "forward" in name and vars(again)[name]]
    assert own == [[str], [True]]
    for one in placed:
        one.remove()


def test_a_file_of_a_whole_model_needs_no_hook_to_be_allowed():
    model = nn.Linear(3, 2)
    placed = hooked(model, [])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Linear]):
        assert torch.equal(torch.load(file, weights_only=True).weight, model.weight)
    for one in placed:
        one.remove()


def test_what_a_file_is_left_with_is_no_other_hook(monkeypatch):
    """A class that packs its attributes away leaves a hook without effect; torch counts hooks anew in each process."""
    first = RemovableHandle.next_id
    model = Reduced(3, 2)
    hooked(model, [])
    file = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", first)
    again, seen = pickle.loads(file), []
    again.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    again.register_forward_hook(lambda module, args, output: seen.append(len(args)))
    again(torch.randn(4, 3))
    assert seen == [1, 1]
    assert not {"pybatch.noise.hooks", "tests"} & {getattr(h, "__module__", "") for h in again._forward_hooks.values()}
    monkeypatch.setitem(sys.modules, "pybatch.noise.hooks", None)
    assert len(pickle.loads(file)._forward_hooks) == 1


def test_a_class_is_copied_by_itself_again_when_its_last_hook_is_gone():
    class Own(nn.Linear):
        pass

    def own(model):
        return nn.Linear, (3, 2)

    one, other = Itemwise(3, 2), Itemwise(3, 2)
    placed = [*hooked(one, []), *hooked(other, [])]
    for hook in placed[:3]:
        hook.remove()
        hook.remove()
    assert Itemwise in copyreg.dispatch_table
    del other, placed  # whoever never detaches
    gc.collect()
    assert Itemwise not in copyreg.dispatch_table
    copyreg.pickle(Own, own)
    model = Own(3, 2)
    for hook in hooked(model, []):
        assert type(copy.deepcopy(model)) is nn.Linear
        hook.remove()
    assert copyreg.dispatch_table.pop(Own) is own


def test_a_source_that_ends_within_a_step_puts_no_hook_back():
    """The end of the step is still told to it: an ordinary loop turns to another source there."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    handle = MicroBatchNoise(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).sum()
        loss.backward()
        handle.detach()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert not any(p._backward_hooks for p in model.parameters())


def doubled(self, input: tuple[torch.Tensor], output: torch.Tensor):
    return 2 * output


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_model_with_hooks_is_scripted_as_it_is_without():
    """TorchScript compiles every hook it finds, and those of pybatch's are of Python alone."""
    model, called = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), []
    model[0].register_forward_hook(doubled)  # the user's own is compiled
    x = torch.ones(4, 3)
    expected = model(x)
    placed = [*hooked(model, called), *hooked(model[0], called)]
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), expected)
    assert not called
    assert torch.equal(model(x), expected)
    assert called == ["before", "before", "after", "after"]
    for hook in placed:
        hook.remove()
    assert torch.equal(torch.jit.script(model)(x), expected)
    gone = weakref.ref(model)
    del model, placed, hook, scripted
    gc.collect()
    assert gone() is None  # TorchScript keeps types of modules, and would keep their hooks


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripting_that_fails_leaves_the_hooks():
    class Refused(nn.Module):
        def forward(self, x):
            return eval("x")

    model, called = Refused(), []
    hooked(model, called)
    with pytest.raises(Exception, match="eval"):
        torch.jit.script(model)
    model(torch.ones(1))
    assert called == ["before", "after"]


@pytest.mark.parametrize("source", ["per-example", "micro-batches", None])
def test_a_pass_within_torch_func_is_none_of_the_training(source):
    """As of somebody who looks at per-example gradients along the way."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer, source)
    weights = {name: param.detach() for name, param in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    for _ in range(12):
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, torch.randn(5, 6))
        assert found["weight"].shape == (5, 3, 6)
        for _ in range(1 + (source == "micro-batches")):
            model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = handle.noise
    assert noise.small_batch == (4 if source == "micro-batches" else 1)
    assert noise.large_batch == (8 if source == "micro-batches" else 4)
