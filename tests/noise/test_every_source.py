"""What holds for every source of the noise scale alike: layers, dropout, bad steps, saved state."""

import copy
import math

import pytest
import torch
from cases import noise_models
from cases.noise_models import images, loss_of, mlp
from torch import nn

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.base.numerals import counted
from pybatch.fits.noise import pair
from pybatch.noise import measurement
from pybatch.noise.measurement import measure_noise
from pybatch.optim import SGD, AdamW
from pybatch.workloads.quadratic import Quadratic

SOURCES = {
    "micro-batches": {},
    "hooks": {"preconditioned": True},
    "per-example": {"source": "per-example"},
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Regression(noise_models.Regression):
    """B_simple = 16."""

    d, reference_batch = 15, 4


def measure(workload, source, **options):
    return measure_noise(workload, device="cpu", **({"warmup_steps": 0} | SOURCES[source] | options))


@pytest.mark.parametrize("source", SOURCES)
def test_the_quadratic_in_closed_form(source):
    """Its loss is written example by example, so that per-example norms hold too."""
    work = Quadratic(d=20, noise=8.0)
    found = measure(work, source, seed=1)
    assert found.low <= work.noise_scale() <= found.high


class Deep(Regression):
    def model(self):
        return nn.Sequential(nn.Linear(15, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("source", SOURCES)
def test_layers_are_every_parameters_share_and_only_where_asked_for(source, monkeypatch):
    found = measure(Deep(), source, layers=True)
    assert [layer.name for layer in found.layers] == [name for name, _ in Deep().model().named_parameters()]
    assert sum(layer.trace for layer in found.layers) == pytest.approx(found.trace, rel=1e-5)
    assert sum(layer.grad_sq for layer in found.layers) == pytest.approx(found.grad_sq, rel=1e-4, abs=1e-6)
    assert all(layer.status in ("resolved", "lower_bound") for layer in found.layers)
    monkeypatch.setattr(measurement, "WIDTH", 0.6)
    bare = measure(Deep(), source)
    assert (bare.layers, bare.status) == ((), "resolved")


class Dropping(Regression):
    """Half of the inputs dropped and the others doubled: more noise in training mode."""

    def model(self):
        return nn.Sequential(nn.Dropout(0.5), super().model())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("source", SOURCES)
def test_dropout_in_both_modes(source):
    found = measure(Dropping(), source, mode="both", time_budget=16)
    assert found.eval_mode.low <= 16 <= found.eval_mode.high
    assert found.low > found.eval_mode.high
    assert any("dropout was active" in n.text for n in found.notes)


class Still(Regression):
    def batch(self, n, generator, split="train"):
        return super().batch(n, torch.Generator().manual_seed(0), split)


class Zero(Regression):
    def loss(self, model, batch):
        return 0.0 * super().loss(model, batch)


@pytest.mark.parametrize("source", ["micro-batches", "hooks"])
def test_equal_batches_are_no_number(source):
    found = measure(Still(), source, time_budget=600)
    assert (found.status, found.b_simple) == ("unresolved", None)
    assert "equal within rounding" in found.notes[0].text


def test_equal_batches_leave_the_noise_of_their_examples():
    """Per example there is a number: of those few examples, which the mean gradient of each batch repeats."""
    found = measure(Still(), "per-example", micro_batch=8, time_budget=2)
    x = Still().batch(8, None)
    g = (-0.5 * x.sum(1, keepdim=True) * x).double()
    mean = float(g.mean(0).square().sum())
    spread = float(g.square().sum(1).mean()) - mean
    n = found.large_batch
    assert found.grad_sq == pytest.approx((n * mean - (mean + spread)) / (n - 1), rel=1e-4)
    assert found.trace == pytest.approx(spread / (1 - 1 / n), rel=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_zero_gradients_are_no_number(source):
    found = measure(Zero(), source, time_budget=600)
    assert (found.status, found.b_simple) == ("unresolved", None)
    assert "every gradient was zero" in found.notes[0].text


class Overflows(Regression):
    """A gradient that is not finite in one batch of twenty, at a loss that is."""

    def __init__(self):
        self.drawn = 0

    def batch(self, n, generator, split="train"):
        self.drawn += 1
        x = super().batch(n, generator, split)
        return x, torch.full((n, 1), math.inf if self.drawn % 20 == 0 else 1.0)

    def loss(self, model, batch):
        x, scale = batch
        return super().loss(Scaled(model, scale), x)


class Scaled:
    def __init__(self, model, scale):
        self.model, self.scale = model, scale

    def __call__(self, x):
        return Blown.apply(self.model(x), self.scale)


class Blown(torch.autograd.Function):
    """The identity, its gradient multiplied."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@pytest.mark.parametrize("source", SOURCES)
def test_gradients_that_overflow_are_left_out_and_counted(source):
    found = measure(Overflows(), source, time_budget=60, seed=2)
    assert found.skipped > 0
    assert found.low <= 16 <= found.high
    assert any(f"left out: {counted(found.skipped, 'group')}" in n.text for n in found.notes)


def train(model, optimizer, handle, fused, steps):
    """Two micro-batches a step; the optimizer's own accumulation where it is pybatch's."""
    for _ in range(steps):
        for _ in range(2):
            x, y = images(4)
            (loss_of(model(x), y) / (1 if fused else 2)).backward()
            if fused:
                optimizer.accumulate(4)
        optimizer.step()
        optimizer.zero_grad()
    return handle.noise


STATES = {
    "accumulate": (lambda p: SGD(p, lr=0.01, noise=True), {}),
    "micro-batches": (lambda p: torch.optim.SGD(p, lr=0.01), {"layers": True}),
    "adam-moments": (lambda p: torch.optim.AdamW(p, lr=0.01), {"source": "adam-moments", "every": 4, "layers": True}),
}


@pytest.mark.parametrize("name", STATES)
def test_saved_and_restored_with_the_optimizer(name):
    """A run that was saved, loaded into new objects and gone on is the run that was not."""
    make, options = STATES[name]
    fused = name == "accumulate"
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters())
    handle = pybatch.noise.attach(model, optimizer, **options)
    train(model, optimizer, handle, fused, 20)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    random = torch.get_rng_state()
    whole = train(model, optimizer, handle, fused, 20)
    again = mlp()
    again.load_state_dict(saved[0])
    other = make(again.parameters())
    other.load_state_dict(saved[1])
    second = pybatch.noise.attach(again, other, **options)
    second.load_state_dict(saved[2])
    torch.set_rng_state(random)
    resumed = train(again, other, second, fused, 20)
    assert resumed.steps == whole.steps == (10 if name == "adam-moments" else 40)
    assert (resumed.grad_sq, resumed.trace) == pytest.approx((whole.grad_sq, whole.trace), rel=1e-9)
    assert [layer.trace for layer in resumed.layers] == pytest.approx([layer.trace for layer in whole.layers])


def test_a_state_without_statistics_begins_anew():
    """Of the twin, or of an optimizer made without noise=True: not the steps of the run before."""
    model = mlp()
    optimizer, twin = AdamW(model.parameters(), noise=True), torch.optim.AdamW(model.parameters())
    handle = pybatch.noise.attach(model, optimizer)
    assert train(model, optimizer, handle, True, 9).steps == 9
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(twin.state_dict())
    assert (optimizer.noise.steps, optimizer.noise.layers, optimizer.skipped) == (0, (), 0)
    assert train(model, optimizer, handle, True, 3).steps == 3
    optimizer.load_state_dict(saved)
    assert optimizer.noise.steps == 9
    assert len(optimizer.noise.layers) == 4


def test_an_older_state_of_the_moments_begins_a_window():
    """Going back to a checkpoint: sums of a later step must not be taken off it."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=6)
    for _ in range(2):
        step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        step(model, optimizer)
    before = handle.noise
    optimizer.load_state_dict(saved)
    for _ in range(6):
        step(model, optimizer)
    after = handle.noise
    m, v = (sum(float(f(optimizer.state[p][k])) for p in model.parameters()) for k, f in MOMENTS)
    small, large, faded = v / (1 - 0.999**8), m / (1 - 0.9**8) ** 2, 0.9**8
    kappa = 0.1 / 1.9 * (1 + faded) / (1 - faded)
    grad_sq, trace = pair(small, large, 8, 8 / kappa)
    assert (before.steps, after.steps) == (1, 2)
    assert 2 * after.trace - before.trace == pytest.approx(trace, rel=1e-4)
    assert 2 * after.grad_sq - before.grad_sq == pytest.approx(grad_sq, rel=1e-4)


MOMENTS = (("exp_avg", lambda m: m.double().square().sum()), ("exp_avg_sq", lambda v: v.double().sum()))


def step(model, optimizer):
    x, y = images(8)
    loss_of(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_a_source_cannot_give_is_refused():
    class Normed(Regression):
        def model(self):
            return nn.BatchNorm1d(15)

    with pytest.raises(UsageError, match=r"BatchNorm1d.*use source='micro-batches'"):
        measure(Normed(), "per-example")
