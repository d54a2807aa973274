"""Mixed-precision training with a loss scale that overflows at first: every source is that of the finite steps alone.

The truth is the float64 gradient of every example at the parameters of those steps, which no rounding to fp16 enters.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import processor
from cases.noise_models import MODELS, example_gradients, expected, images, loss_of, mlp
from torch import nn

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.noise import norms
from pybatch.noise.per_example import ExampleRecorder
from pybatch.noise.sources import micro_batches
from pybatch.optim import AdamW

# Of tr(Sigma), and of |G|^2 + tr(Sigma) / 12, the squared norm of a step of 12 examples: weights, activations and
# gradients have 11 bits in fp16 and 8 in bf16.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
OPTIMIZERS = {"torch": torch.optim.AdamW, "fused": AdamW}

pytestmark = [pytest.mark.isa, pytest.mark.usefixtures("one_thread")]


class Truth:
    """The pairs of the steps that changed the model, and the number of those that did not."""

    def __init__(self):
        self.pairs, self.skipped = [], 0

    def add(self, pair, moved):
        if moved:
            self.pairs.append([float(part.sum()) for part in pair])
        else:
            self.skipped += 1

    @property
    def steps(self):
        return len(self.pairs)

    def of(self, noise, dtype):
        """Whether the noise scale is that of these steps, all of them and no other."""
        if noise.grad_sq is None or (noise.steps, noise.skipped) != (self.steps, self.skipped):
            return False
        grad_sq, trace = (math.fsum(column) / self.steps for column in zip(*self.pairs, strict=True))
        close = abs(noise.trace - trace) <= TOLERANCE[dtype] * trace
        return close and abs(noise.grad_sq - grad_sq) <= TOLERANCE[dtype] * (grad_sq + trace / 12)


def forward(model, x, y, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return loss_of(model(x), y)


def train(dtype, optimizer="torch", name="mlp", init=2.0**23, set_to_none=True, clip=False, steps=14, scaler=None):
    """A run of three micro-batches a step; `scaler` is what the handle is given in place of the one in use."""
    torch.manual_seed(3)
    make, draw = MODELS[name]
    model = make()
    optimizer = OPTIMIZERS[optimizer](model.parameters(), lr=1e-2)
    used = torch.amp.GradScaler("cpu", init_scale=init, growth_interval=5)
    handle = pybatch.noise.attach(model, optimizer, scaler=scaler or used)
    truth = Truth()
    for _ in range(steps):
        batches = [draw(4) for _ in range(3)]
        pair = expected([example_gradients(model, *batch)[0] for batch in batches])
        before = [p.clone() for p in model.parameters()]
        for x, y in batches:
            used.scale(forward(model, x, y, dtype) / 3).backward()
        if clip:
            used.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        used.step(optimizer)
        used.update()
        optimizer.zero_grad(set_to_none)
        truth.add(pair, any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    return handle.noise, truth


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(  # how gradients are cleared is one parameter's matter, whatever the model
    ("name", "set_to_none"), [("mlp", True), ("mlp", False), ("cnn", True), ("transformer", True)]
)
def test_micro_batches_in_fp16(name, set_to_none, optimizer):
    noise, truth = train(torch.float16, optimizer, name, set_to_none=set_to_none)
    assert truth.skipped >= 4  # some at first, and again where the scale has grown
    assert truth.steps >= 6
    assert truth.of(noise, torch.float16)


def test_clipping_unscales_before_and_changes_nothing():
    noise, truth = train(torch.float16, clip=True)
    assert truth.skipped >= 4
    assert truth.of(noise, torch.float16)


@pytest.mark.parametrize("name", ["mlp", pytest.param("lstm", marks=processor.runs(nn.LSTM, torch.bfloat16))])
def test_micro_batches_in_bf16(name):
    """It has the range of fp32: nothing overflows, with a scaler or without."""
    noise, truth = train(torch.bfloat16, name=name)
    assert truth.skipped == 0
    assert truth.of(noise, torch.bfloat16)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(  # gradients are fp32 under autocast too: one dtype shows many of them, and a tied one
    ("name", "dtype"), [("mlp", torch.bfloat16), ("mlp", torch.float32), ("transformer", torch.bfloat16)]
)
def test_squares_of_a_scale_past_2_to_the_64_do_not_overflow(dtype, name, optimizer):
    """Where nothing overflows a scaler doubles its scale for ever; gradients of 2^70 have squares of 2^140."""
    noise, truth = train(dtype, optimizer, name, init=2.0**70)
    assert truth.skipped == 0
    assert truth.steps == 14
    assert truth.of(noise, dtype)


def narrow(monkeypatch):
    """Squares in fp32, whatever the loss was multiplied by."""
    monkeypatch.setattr(norms, "_products", lambda dtype, scaled: torch.float32)


def unaware(*_):
    """A scale that is not taken out."""
    return {"scaler": SimpleNamespace(scale=lambda x: x, get_scale=lambda: 1.0)}


def keep_overflow(monkeypatch):
    """The passes of a step that was left out stay in the next one."""
    monkeypatch.setattr(micro_batches.MicroBatchNoise, "_abandon", lambda self: None)


def count_overflow(monkeypatch):
    """A pair that is not finite enters as what its largest numbers would have been."""
    update = NoiseAccumulator.update

    def skip(self):
        update(self, 1e9, 1e9, 4.0, 12.0)

    monkeypatch.setattr(NoiseAccumulator, "skip", skip)


def miss_zeros(monkeypatch):
    """Gradients set to zero in place are not noticed."""
    monkeypatch.setattr(micro_batches, "mark", lambda param: None)


def test_squares_in_fp32_would_be_caught(monkeypatch):
    narrow(monkeypatch)
    noise, truth = train(torch.bfloat16, init=2.0**70)
    assert not truth.of(noise, torch.bfloat16)


@pytest.mark.parametrize("mutation", [unaware, keep_overflow, count_overflow, miss_zeros])
def test_a_wrong_implementation_is_caught(monkeypatch, mutation):
    options = mutation(monkeypatch) or {}
    noise, truth = train(torch.float16, set_to_none=mutation is not miss_zeros, **options)
    assert not truth.of(noise, torch.float16)


def test_the_fused_accumulation_takes_its_scale_from_the_optimizer():
    """`accumulate` consumes what a scaler looks at, so the scale is kept by hand; the verdict is the optimizer's."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=1e-2, noise=True)
    scale, truth = 2.0**23, Truth()
    for _ in range(14):
        batches = [images(n) for n in (3, 5, 4)]
        pair = expected([example_gradients(model, *batch)[0] for batch in batches], weighted=True)
        before = [p.clone() for p in model.parameters()]
        for x, y in batches:
            (forward(model, x, y, torch.float16) * scale).backward()
            optimizer.accumulate(len(x))
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        scale *= 1.0 if moved else 0.25
        truth.add(pair, moved)
    assert truth.skipped >= 2
    assert truth.of(optimizer.noise, torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(forward(model, *images(4), torch.float16)).backward()
    optimizer.accumulate(4)
    with pytest.raises(UsageError, match="the scaler looks for infinities"):
        scaler.step(optimizer)


STEPS = 14


def moments(kind, every):
    """(noise, steps taken, |m|^2 and sum of v, both bias-corrected) of a run, from float64 gradients."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23, growth_interval=10**6)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=every)
    m = v = torch.zeros((), dtype=torch.float64)
    taken = 0
    for _ in range(STEPS):
        x, y = images(8)
        g = example_gradients(model, x, y)[0].mean(0)
        before = [p.clone() for p in model.parameters()]
        scaler.scale(forward(model, x, y, torch.float16)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)):
            m, v, taken = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square(), taken + 1
    return handle.noise, taken, float((m / (1 - 0.9**taken)).square().sum()), float(v.sum()) / (1 - 0.999**taken)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_are_of_the_finite_steps(kind):
    """One window that holds the whole run. A scaler calls the step of torch's only where gradients are finite."""
    _, taken, _, _ = moments(kind, 10**6)
    assert 6 <= taken <= STEPS - 4
    noise, _, large, small = moments(kind, STEPS if kind == "fused" else taken)
    kappa = sum((0.1 * 0.9**i / (1 - 0.9**taken)) ** 2 for i in range(taken))
    assert (noise.steps, noise.skipped) == (1, 0)
    assert noise.trace == pytest.approx((small - large) / (1 / 8 - kappa / 8), rel=TOLERANCE[torch.float16])
    assert any(n.figure == "noise.skipped" for n in noise.notes)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_per_example_norms_of_a_scaled_loss(dtype):
    """They are those of the loss times the scale; where it overflows the total is not finite, never a wrong number."""
    torch.manual_seed(3)
    model = mlp()
    x, y = images(8)
    recorder = ExampleRecorder(model)
    truth = example_gradients(model, x, y)[0].square().sum(1)
    for scale in (2.0**8, 2.0**30):
        model.zero_grad()
        with recorder.record(8) as norms:
            (forward(model, x, y, dtype) * scale).backward()
        if dtype == torch.float16 and scale > 2.0**16:
            assert not norms.total.isfinite().all()
            assert not norms.sq_large.isfinite()
        else:
            torch.testing.assert_close(norms.total / scale**2, truth, rtol=10 * TOLERANCE[dtype], atol=0.0)
