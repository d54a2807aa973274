"""The noise scale from exact per-example norms: coverage on the closed forms, and the way from a workload to it."""

import math

import numpy as np
import pytest
import torch
from cases.noise_models import Regression
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.fits.noise import estimate, pair
from pybatch.noise.measurement import measure_noise
from pybatch.noise.per_example import ExampleRecorder
from pybatch.noise.per_example.feed import ExampleFeed, probed
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session

DECAYING = 1 / np.arange(1, 41)
# Scales of the inputs, label noise, examples a batch, pairs: isotropic and two anisotropic, ever less signal.
CASES = {
    "strong signal": (np.ones(63), 0.0, 32, 64),
    "even": (DECAYING, 10.0, 128, 48),
    "weak signal": (DECAYING, 60.0, 128, 48),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def closed_form(scales, noise):
    """B_simple of x ~ N(0, diag(scales)), weights half a unit off, labels of this noise variance."""
    grad_sq = float(np.sum((scales * 0.5) ** 2))
    return 1 + (float(np.sum(scales * 0.25)) + noise) * float(np.sum(scales)) / grad_sq


def rows_by_example(rng, scales, noise, n, pairs):
    """Rows [pairs, 3] from simulated gradients r_i x_i; |r_i x_i|^2 is what a linear layer's rule computes."""
    x = rng.standard_normal((pairs, n, len(scales)), dtype=np.float32) * np.sqrt(scales).astype(np.float32)
    residual = 0.5 * x.sum(-1) - np.float32(math.sqrt(noise)) * rng.standard_normal((pairs, n), dtype=np.float32)
    small = (residual.astype(np.float64) ** 2 * np.einsum("pnd,pnd->pn", x, x)).mean(1)
    mean = (residual[:, None] @ x)[:, 0].astype(np.float64) / n
    return np.column_stack([np.ones(pairs), *pair(small, (mean**2).sum(-1), 1, n)])


@pytest.mark.parametrize("case", CASES)
def test_interval_holds_the_truth(case):
    rng, truth = np.random.default_rng(7), closed_form(*CASES[case][:2])
    found = [estimate(rows_by_example(rng, *CASES[case]), source="per-example") for _ in range(400)]
    held = [(f.low is None or f.low <= truth) and (f.high is None or truth <= f.high) for f in found]
    assert 0.93 <= np.mean(held) <= 0.97
    resolved = np.mean([f.status == "resolved" for f in found])
    assert 0.05 < resolved < 0.9 if case == "weak signal" else resolved > 0.99


def test_closed_form_of_the_isotropic_case():
    assert closed_form(np.ones(63), 0.0) == pytest.approx(64)


def test_measure_noise_on_the_closed_form():
    options = {"device": "cpu", "warmup_steps": 0, "micro_batch": 32, "source": "per-example", "layers": True}
    found = [measure_noise(Regression(), seed=seed, **options) for seed in range(6)]
    assert {(f.status, f.source, f.small_batch) for f in found} == {("resolved", "per-example", 1)}
    assert sum(f.low <= 64 <= f.high for f in found) >= 5
    assert np.mean([f.b_simple for f in found]) == pytest.approx(64, rel=0.05)
    assert [layer.name for layer in found[0].layers] == ["weight"]
    assert found[0].layers[0].b_simple == pytest.approx(found[0].b_simple)
    assert all(f.loss == pytest.approx(0.5 * 63 / 4, rel=0.25) for f in found)


def test_single_examples_resolve_more_than_micro_batches():
    """From the same groups of 4 x 16 examples both estimates have a smaller error."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 4, 16, 63), dtype=np.float32)
    g = (0.5 * x.sum(-1, keepdims=True) * x).astype(np.float64)
    large = (g.mean((1, 2)) ** 2).sum(-1)
    one = pair((g**2).sum(-1).mean((1, 2)), large, 1, 64)
    four = pair((g.mean(2) ** 2).sum(-1).mean(1), large, 16, 64)
    assert one[1].std() < 0.95 * four[1].std()  # of the same groups: the seed does not matter
    assert one[0].std() < 0.99 * four[0].std()


def test_a_group_of_micro_batches_is_one_batch():
    """The pair of a group is that of its examples taken together, per parameter and in total."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(12, 5)
    with ExampleRecorder(model).record(12) as norms:
        model(x).square().mean().backward()
    feed = ExampleFeed(model)
    for part in x.split(4):
        feed.micro_batch(lambda scale, part=part: backward(scale * model(part).square().mean()), 4)
    feed.group()
    _, grad_sq, trace = feed.accumulator.rows[0]
    expected = pair(float(norms.sq_small), float(norms.sq_large), 1, 12)
    assert (grad_sq, trace) == pytest.approx(expected, rel=1e-5)
    for layer in feed.noise.layers:
        own = pair(float(norms.by_parameter[layer.name].mean()), float(norms.mean_sq[layer.name]), 1, 12)
        assert (layer.grad_sq, layer.trace) == pytest.approx(own, rel=1e-5)


def backward(loss):
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("name", "model"), [("digits", "mlp"), ("digits", "cnn"), ("text", "transformer")])
def test_shipped_workloads_can_be_measured(name, model):
    session = Session(type(find(name))(model), torch.device("cpu"))
    feed = probed(session, layers=True)()
    for _ in range(2):
        feed.micro_batch(lambda scale: session.backward(session.batch(4), scale), 4)
    feed.group()
    found = feed.noise
    assert (found.steps, found.large_batch, found.source) == (1, 8, "per-example")
    assert {layer.name for layer in found.layers} == {n for n, _ in session.model.named_parameters()}
    assert all(layer.trace > 0 for layer in found.layers)


def test_what_cannot_be_measured_is_refused_first():
    class Normed(Regression):
        def model(self):
            return nn.Sequential(nn.Linear(63, 4), nn.BatchNorm1d(4))

    steps = []
    with pytest.raises(UsageError, match=r"'1' \(BatchNorm1d\)"):
        measure_noise(Normed(), device="cpu", source="per-example", progress=lambda *a: steps.append(a))
    assert steps == []
    with pytest.raises(UsageError, match=r"source 'example' is not known\. Did you mean 'per-example'"):
        measure_noise(Regression(), device="cpu", source="example")
