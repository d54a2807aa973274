"""Saved and loaded: the twin's keys and no more, through distributed checkpoints too, with the noise statistics."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import pybatch.optim
from pybatch.base.errors import UsageError

TWINS = {
    "SGD": [{}, {"momentum": 0.9}],
    "Adam": [{}, {"amsgrad": True}],
    "AdamW": [{}, {"amsgrad": True}],
    "NAdam": [{}],
}
CASES = [(name, options) for name, all_ in TWINS.items() for options in all_]
ALL = ["SGD", "Adam", "AdamW", "NAdam", "Adan", "Lion", "LARS", "LAMB", "Muon"]

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def train(net, optimizer, steps, seed=1, accumulate=False):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _ in range(2):
            (net(torch.randn(5, 4, generator=generator)).square().mean() / (1 if accumulate else 2)).backward()
            if accumulate:
                optimizer.accumulate(5)
        optimizer.step()
        optimizer.zero_grad()


def made(module, name, net, options, **own):
    return getattr(module, name)(net.parameters(), lr=0.05, **options, **own)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_state_dict_has_the_twins_keys(name, options):
    found = []
    for module in (torch.optim, pybatch.optim):
        net = model()
        optimizer = made(module, name, net, options)
        train(net, optimizer, 2)
        for _ in range(2):  # and again after it was loaded
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
        groups = [sorted(group) for group in state["param_groups"]]
        found.append((sorted(state), groups, {i: sorted(entry) for i, entry in state["state"].items() if entry}))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALL)
def test_load_and_save_give_the_same_keys(name):
    net = model()
    optimizer = made(pybatch.optim, name, net, {}, noise=True)
    train(net, optimizer, 2, accumulate=True)
    first = optimizer.state_dict()
    again = made(pybatch.optim, name, model(), {}, noise=True)
    again.load_state_dict(first)
    second = again.state_dict()
    assert [set(group) for group in first["param_groups"]] == [set(group) for group in second["param_groups"]]
    assert {i: set(entry) for i, entry in first["state"].items()} == {
        i: set(entry) for i, entry in second["state"].items()
    }


def through_dcp(source, target, path, flat):
    """The state of (model, optimizer) `source` into `target`, by torch.distributed.checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that nothing is distributed
        if source is not None:
            weights, states = get_state_dict(*source, options=options)
            dcp.save({"m": weights, "o": states}, checkpoint_id=path)
        weights, states = get_state_dict(*target, options=options)
        loaded = {"m": weights, "o": states}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(*target, model_state_dict=loaded["m"], optim_state_dict=loaded["o"], options=options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {}), ("NAdam", {}), ("Lion", {})])
def test_a_checkpoint_is_loaded_again_and_again_with_its_noise(name, options, flat, tmp_path):
    """The run goes on to the bit of one that was not saved, its statistics included."""
    whole, saved = model(), model()
    own = [made(pybatch.optim, name, net, options, noise=True) for net in (whole, saved)]
    for net, optimizer in zip((whole, saved), own, strict=True):
        train(net, optimizer, 6, accumulate=True)
    loaded = model()
    again = made(pybatch.optim, name, loaded, options, noise=True)
    through_dcp((saved, own[1]), (loaded, again), tmp_path, flat)
    for _ in range(2):
        through_dcp(None, (loaded, again), tmp_path, flat)
    for net, optimizer in ((whole, own[0]), (loaded, again)):
        train(net, optimizer, 6, seed=2, accumulate=True)
    for p, q in zip(whole.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again.noise == own[0].noise
    assert again.noise.steps > 0


@pytest.mark.parametrize("to", ["twin", "own"])
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_checkpoints_of_twins_are_exchanged(name, options, to, tmp_path):
    modules = [torch.optim, pybatch.optim]
    source, target = modules if to == "own" else modules[::-1]
    saved, loaded = model(), model()
    before, after = made(source, name, saved, options), made(target, name, loaded, options)
    train(saved, before, 3)
    through_dcp((saved, before), (loaded, after), tmp_path, flat=False)
    train(saved, before, 3, seed=2)
    train(loaded, after, 3, seed=2)
    for p, q in zip(saved.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_statistics_survive_a_file(tmp_path):
    net = model()
    optimizer = pybatch.optim.AdamW(net.parameters(), noise=True, stochastic_rounding=2**62 + 12345)
    train(net, optimizer, 4, accumulate=True)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = pybatch.optim.AdamW(model().parameters(), noise=True, stochastic_rounding=True)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.noise == optimizer.noise
    assert again._seed == 2**62 + 12345


def test_the_twin_loads_what_was_measured_beside(tmp_path):
    net = model()
    optimizer = pybatch.optim.AdamW(net.parameters(), noise=True)
    train(net, optimizer, 4, accumulate=True)
    twin = torch.optim.AdamW(net.parameters())
    twin.load_state_dict(optimizer.state_dict())
    train(net, twin, 2)


def test_statistics_of_another_version_are_refused():
    net = model()
    optimizer = pybatch.optim.AdamW(net.parameters(), noise=True)
    train(net, optimizer, 4, accumulate=True)
    state = optimizer.state_dict()
    state["state"][0]["noise_statistics"] = state["state"][0]["noise_statistics"][:-1]
    again = pybatch.optim.AdamW(model().parameters(), noise=True)
    with pytest.raises(UsageError, match="another version"):
        again.load_state_dict(state)
    assert not again.state


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ALL)
def test_a_copy_goes_on_alone(name, copied):
    """A plain step is the first of the copy, which was made of one that was to measure and did not."""
    net = model()
    optimizer = made(pybatch.optim, name, net, {}, noise=True)
    with pytest.warns(UserWarning, match="no noise is measured"):
        train(net, optimizer, 1)
    again, other = copied((net, optimizer))
    for one, by in ((net, optimizer), (again, other)):
        train(one, by, 2, seed=3)
        train(one, by, 3, seed=4, accumulate=True)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.noise == other.noise


def test_the_newest_statistics_are_saved_after_the_bearer_was_frozen():
    net = model()
    optimizer = pybatch.optim.AdamW(net.parameters(), noise=True)
    train(net, optimizer, 4, accumulate=True)
    optimizer.state_dict()
    next(net.parameters()).requires_grad_(False)
    train(net, optimizer, 9, accumulate=True)
    saved = optimizer.state_dict()
    assert ["noise_statistics" in entry for entry in saved["state"].values()].count(True) == 1
    again = pybatch.optim.AdamW(net.parameters(), noise=True)
    again.load_state_dict(saved)
    assert again.noise == optimizer.noise


@pytest.mark.parametrize("kinds", [(True, "remainder"), ("remainder", True)])
def test_masters_and_remainders_are_exchanged_to_the_bit(kinds):
    """The run goes on with the fp32 values it had, and keeps nothing of the other kind."""
    torch.manual_seed(0)
    begin = torch.randn(300).bfloat16()
    grads = [torch.randn(300).bfloat16() for _ in range(60)]
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    whole, first = (pybatch.optim.AdamW([p], lr=1e-4, master_weights=kinds[0]) for p in params)
    for grad in grads[:30]:
        for p, optimizer in zip(params, (whole, first), strict=True):
            p.grad = grad.clone()
            optimizer.step()
    other = pybatch.optim.AdamW([params[1]], lr=1e-4, master_weights=kinds[1])
    other.load_state_dict(first.state_dict())
    for grad in grads[30:]:
        for p, optimizer in zip(params, (whole, other), strict=True):
            p.grad = grad.clone()
            optimizer.step()
    kept, names = other.state[params[1]], ("master", "remainder")
    assert [name for name in names if name in kept] == ["remainder" if kinds[1] == "remainder" else "master"]
    values = []
    for p, optimizer in zip(params, (whole, other), strict=True):
        own = optimizer.state[p]
        joined = (p.detach().view(torch.int16).int() << 16) + own["remainder"].int() if "remainder" in own else None
        values.append(own["master"] if joined is None else joined.view(torch.float32))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ("AdamW", "Adan"),
        ("Adan", "AdamW"),
        ("Adan", "NAdam"),
        ("AdamW", "SGD"),
        ("SGD", "AdamW"),
        ("AdamW", "Lion"),
        ("AdamW", "NAdam"),
    ],
)
def test_groups_of_another_optimizer_are_refused_before_anything_is_changed(saved, loading):
    net = model()
    source, target = (made(pybatch.optim, name, net, {}) for name in (saved, loading))
    train(net, source, 1)
    before = dict(target.param_groups[0])
    with pytest.raises(UsageError, match=r"load_state_dict\(\): .* another optimizer's"):
        target.load_state_dict(source.state_dict())
    assert target.param_groups[0] == before
    assert not target.state
