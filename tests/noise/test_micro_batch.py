"""The noise scale of a workload: against closed forms, exact per-example gradients, and every way it can go wrong."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases.intervals import miss
from cases.noise_models import Regression
from torch import nn

from pybatch.base.errors import Interrupted, UsageError, WorkloadError
from pybatch.fits.noise import INTERRUPTED
from pybatch.noise import measurement as micro_batch
from pybatch.noise.confounds import confounds
from pybatch.noise.measurement import measure_noise
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")


def test_interval_holds_the_closed_form():
    """Stopping on a look at the interval costs some of the 95 %; not more than to 90 % of repeats.

    A third of them with micro-batches so small that groups grow in between, which takes four times as long.
    """
    sizes = [8 if seed % 3 == 0 else 16 for seed in range(60)]
    found = [
        measure_noise(Regression(), device="cpu", seed=seed, warmup_steps=0, micro_batch=size)
        for seed, size in enumerate(sizes)
    ]
    assert {n.status for n in found} == {"resolved"}
    missed = [miss(64, n.b_simple, n.low, n.high) for n in found]
    assert sum(m <= 1 for m in missed) >= 54
    assert np.mean(np.square(missed)) < 0.65**2  # half as wide, they would miss by 1 and more
    assert np.mean([n.b_simple for n in found]) == pytest.approx(64, rel=0.04)
    assert all(micro_batch.relative_width(n) <= micro_batch.WIDTH for n in found)
    assert all(n.loss == pytest.approx(0.5 * 63 / 4, rel=0.25) for n in found)


@pytest.mark.parametrize("size", [2, 64])
def test_micro_batch_does_not_move_the_answer(size):
    found = measure_noise(Regression(), device="cpu", warmup_steps=0, micro_batch=size, seed=3)
    assert found.small_batch == size
    assert found.low <= 64 <= found.high


def exact_scale(session):
    """B_simple of the digits from all their per-example gradients, in float64."""
    images, labels = session.workload_data
    model = session.model.double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, image, label):
        out = torch.func.functional_call(model, p, (image[None],))
        return nn.functional.cross_entropy(out, label[None])

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images.double(), labels)
    flat = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    mean_sq = float(flat.mean(0).square().sum())
    return (float(flat.square().sum(1).mean()) - mean_sq) / mean_sq


def test_digits_against_exact_per_example_gradients(monkeypatch):
    """After the warm-up, the whole training set's per-example gradients give the scale exactly."""
    from pybatch.workloads import digits

    kept = []
    monkeypatch.setattr(Session, "__init__", keep(Session.__init__, kept))
    found = measure_noise(find("digits"), device="cpu", seed=1, warmup_steps=100)
    (session,) = kept
    train = digits.load()["train"]
    session.workload_data = train.pixels, train.labels
    truth = exact_scale(session)
    assert found.status == "resolved"
    assert found.low <= truth <= found.high
    assert (found.warmup_steps, found.learning_rate) == (100, find("digits").learning_rate)
    assert found.high / found.low < 1.5


def keep(init, kept):
    def wrapper(self, *args, **kwargs):
        init(self, *args, **kwargs)
        kept.append(self)

    return wrapper


def test_parameters_stay_where_the_warm_up_left_them(monkeypatch):
    kept = []
    monkeypatch.setattr(Session, "__init__", keep(Session.__init__, kept))
    measure_noise(Regression(), device="cpu", warmup_steps=0)
    assert all((p == 0).all() for p in kept[0].parameters)


@pytest.mark.usefixtures("wide")
def test_same_seed_same_groups():
    one, two = (measure_noise(Regression(), device="cpu", warmup_steps=5, seed=4) for _ in range(2))
    assert one == two
    assert one != measure_noise(Regression(), device="cpu", warmup_steps=5, seed=5)


class Noisy(Regression):
    """Labels of pure noise on top: |G|^2 sinks under it."""

    def loss(self, model, batch):
        return 0.5 * (model(batch)[:, 0] - 0.002 * batch.sum(1) - torch.randn(len(batch))).square().mean()


def test_budget_too_short_for_an_answer_says_so(monkeypatch):
    calls = itertools.count()  # a clock of its own: how many steps there are must not depend on who else computes
    monkeypatch.setattr("pybatch.noise.measurement.time", SimpleNamespace(monotonic=lambda: 0.01 * next(calls)))
    found = measure_noise(Noisy(), device="cpu", warmup_steps=0, time_budget=0.3, micro_batch=4)
    assert found.status in ("lower_bound", "unresolved")
    assert found.b_simple is None
    assert found.notes[0].figure == "noise.b_simple"
    nothing = measure_noise(Regression(), device="cpu", warmup_steps=0, time_budget=1e-6)
    assert nothing.status == "unresolved"
    assert "before the first group" in nothing.notes[0].text


@pytest.mark.usefixtures("wide")
def test_groups_grow_to_the_scale():
    """A small |G|^2 needs groups about as large as the scale: 1664 here, from groups of 64 to begin with."""
    found = measure_noise(Weak(), device="cpu", warmup_steps=0, micro_batch=16)
    assert found.status == "resolved"
    assert found.low <= Weak.truth <= found.high
    assert found.large_batch >= 8 * 64


class Weak(Regression):
    """B_simple = d + 1 + d sigma^2 / |e|^2 with label noise sigma^2."""

    truth = 64 + 63 * 400.0 / (63 / 4)

    def loss(self, model, batch):
        target = 0.5 * batch.sum(1) + 20.0 * torch.randn(len(batch))
        return 0.5 * (model(batch)[:, 0] - target).square().mean()


def test_slow_warm_up_is_shortened_and_said(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 0.01  # each look at the clock costs 10 ms
        return now[0]

    monkeypatch.setattr(micro_batch.time, "monotonic", clock)
    found = measure_noise(Regression(), device="cpu", time_budget=1.0)
    assert 10 < found.warmup_steps < 60
    assert any(n.figure == "noise.warmup_steps" and "of 200 steps" in n.text for n in found.notes)


class Confounded(Regression):
    examples = 100

    def model(self):
        return nn.Sequential(nn.Linear(63, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def test_confounds_are_named():
    text = " ".join(n.text for n in measure_noise(Confounded(), device="cpu", warmup_steps=0, time_budget=2).notes)
    for word in ("BatchNorm", "dropout was active", "100 examples"):
        assert word in text
    clean = measure_noise(Regression(), device="cpu", warmup_steps=0).notes
    assert clean == ()
    found = measure_noise(Regression(), device="cpu", warmup_steps=0)
    assert confounds(nn.Sequential(nn.Dropout(0.0), nn.LSTM(4, 4)), None, found) == []
    assert confounds(nn.LSTM(4, 4, num_layers=2, dropout=0.1), None, found) != []


class Stops(Regression):
    """Ctrl-C in the middle of so many draws, five to a group: four micro-batches and a training step."""

    def __init__(self, after):
        self.after = after

    def batch(self, n, generator, split="train"):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return super().batch(n, generator, split)


def test_ctrl_c_keeps_what_was_measured():
    with pytest.raises(Interrupted) as early:
        measure_noise(Stops(10), device="cpu", warmup_steps=20)
    assert early.value.partial is None
    with pytest.raises(Interrupted) as late:
        measure_noise(Stops(20 + 5 * 20 + 2), device="cpu", warmup_steps=20, micro_batch=32)
    partial = late.value.partial
    assert (partial.steps, partial.warmup_steps, partial.large_batch) == (20, 20, 128)
    assert not any(note.text.startswith(INTERRUPTED) for note in partial.notes)  # it was narrow by then
    assert partial.status == "resolved"
    with pytest.raises(Interrupted) as wide:
        measure_noise(Stops(20 + 5 * 5 + 2), device="cpu", warmup_steps=20, micro_batch=32)
    assert any(note.text.startswith(INTERRUPTED) for note in wide.value.partial.notes)


class Explodes(Regression):
    def loss(self, model, batch):
        return super().loss(model, batch) * math.nan


def test_nan_loss_names_the_method():
    for warmup in (0, 30):
        with pytest.raises(WorkloadError, match=r"Explodes\.loss\(\).*nan"):
            measure_noise(Explodes(), device="cpu", warmup_steps=warmup)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"time_budget": 0}, "time_budget 0 leaves no time"),
        ({"time_budget": math.nan}, "time_budget nan"),
        ({"warmup_steps": -1}, "warmup_steps -1 is negative"),
        ({"micro_batch": 0}, "micro_batch 0 holds no example"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
    ],
)
def test_bad_arguments(option, says):
    with pytest.raises(UsageError, match=says):
        measure_noise(Regression(), device="cpu", **option)


class Smaller(Regression):
    """B_simple = 32, which groups half as large resolve."""

    d = 31


@pytest.mark.parametrize(
    "options", [{"layers": True, "preconditioned": True, "mode": "both"}, {"preconditioned": True, "hessian": True}]
)
def test_hooks_of_one_part_do_not_see_the_next(options, monkeypatch):
    """Several rounds, both modes and curvature: each takes its own passes alone. It ends when resolved, not by time."""
    monkeypatch.setattr(micro_batch, "WIDTH", 0.3 if "layers" in options else 0.6)  # the parts, not their widths
    given = {"warmup_steps": 2, "micro_batch": 2, "time_budget": 60.0, "seed": 3}  # of these curvature is soon resolved
    found = measure_noise(Smaller(), device="cpu", **given, **options)
    assert found.status == "resolved"
    assert found.large_batch > 2 * micro_batch.FIRST_GROUP  # more than one round
    if "layers" in options:
        assert found.preconditioned.status == "resolved"
        assert sum(layer.trace for layer in found.layers) == pytest.approx(found.trace, rel=1e-6)
        assert found.eval_mode.status == "resolved"
    else:
        assert {found.preconditioned.status, found.hessian.status} == {"resolved"}
