"""Which stretch of a run is read: on planted runs it holds its own truth, says its steps and its drift."""

import itertools

import numpy as np
import pytest

from pybatch.fits import stretch
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.fits.noise import judge, pair

SMALL, LARGE = 8, 32


def rows(scale, seed=0, dims=30, grad_sq=1.0):
    """Pairs of a run with this noise scale at each step, one a row: G along one axis, noise alike along all."""
    scale, rng = np.asarray(scale, dtype=float), np.random.default_rng(seed)
    spread = np.sqrt(scale * grad_sq / dims / SMALL)[:, None, None]
    grads = rng.normal(size=(len(scale), LARGE // SMALL, dims)) * spread
    grads[..., 0] += np.sqrt(np.broadcast_to(grad_sq, scale.shape))[:, None]
    small, large = (grads**2).sum(-1).mean(1), (grads.mean(1) ** 2).sum(-1)
    return np.stack([np.ones(len(scale)), *pair(small, large, SMALL, LARGE)], axis=1), (small, large)


def fed(scale, layers=(), **options):
    accumulator = NoiseAccumulator(layers=layers)
    _, norms = rows(scale, **options)
    for small, large in zip(*norms, strict=True):
        own = [[small, large]] * len(layers) if layers else None
        accumulator.update(small, large, SMALL, LARGE, layers=own)
    return accumulator


def test_a_growing_scale_is_read_from_the_newest_steps_not_from_the_mean_over_all():
    """As in training: |G|^2 falls twentyfold and the noise scale grows, so that a mean over all steps lags."""
    steps = np.arange(800)
    scale, grad_sq = 30 + steps / 2, 0.05 + np.exp(-steps / 100)
    accumulator = fed(scale, grad_sq=grad_sq)
    found, whole = accumulator.newest(), accumulator.estimate()
    assert whole.status == "resolved"
    assert whole.high < 300  # far from the 430 that it is at the end
    assert found.first_step > 400
    assert found.last_step == 800
    own = scale[found.first_step - 1 :]
    assert found.low <= own.mean() <= found.high
    assert found.low > whole.b_simple


@pytest.mark.parametrize("scale", [20.0, 100.0, 400.0])
def test_on_a_steady_run_the_stretch_read_holds_the_truth_as_often_as_it_says(scale):
    """Choosing a stretch by its interval must not cost the interval its coverage."""
    held = []
    for seed in range(150):
        own, _ = rows(np.full(128, scale), seed)
        found = judge(own[stretch.newest(own, SMALL) :])
        if found.status == "resolved":
            held.append(found.low <= scale <= found.high)
    assert len(held) > 100
    assert np.mean(held) > 0.9


def test_where_no_newer_stretch_gives_an_interval_the_whole_run_is_read():
    own, _ = rows(np.full(60, 3000.0))
    assert judge(own[-30:]).status != "resolved"
    assert stretch.newest(own) == 0
    assert stretch.newest(own[:4]) == 0
    assert stretch.newest(np.zeros((0, 3))) == 0


def test_a_drift_between_the_halves_is_said_with_both_figures():
    steady = [stretch.drifts(rows(np.full(64, 40.0), seed)[0]) for seed in range(150)]
    assert np.mean(steady) < 0.04
    grown = [stretch.drifts(rows(np.repeat([30.0, 160.0], 32), seed)[0]) for seed in range(50)]
    assert np.mean(grown) > 0.9
    fallen = np.repeat([1.0, 0.2], 32)  # the gradient and its noise alike
    alike = [stretch.drifts(rows(np.full(64, 30.0), seed, grad_sq=fallen)[0]) for seed in range(50)]
    assert np.mean(alike) < 0.1
    accumulator = fed(np.repeat([20.0, 20.0, 20.0, 600.0], 64))
    [note] = [note for note in accumulator.newest().notes if "drifts" in note.text]
    assert "19.2 [17.9 to 20.6] over their first half, at least 186 over their second" in note.text
    assert "trajectory" in note.text
    assert not any("drifts" in note.text for note in fed(np.full(256, 40.0)).newest().notes)


def test_the_trajectory_is_the_whole_run_from_its_eighth_step_on():
    accumulator = fed(np.full(8, 20.0))
    [point] = accumulator.newest().trajectory
    assert (point.first_step, point.last_step, point.steps) == (1, 8, 8)
    assert point.status == "resolved"
    accumulator = fed(np.linspace(10, 60, 1000))
    found = accumulator.newest()
    points = found.trajectory
    assert len(points) == 16
    assert (points[0].first_step, points[-1].last_step) == (1, 1000)
    assert all(a.last_step + 1 == b.first_step for a, b in itertools.pairwise(points))
    assert sum(point.steps for point in points) == 1000
    whole = accumulator.estimate()
    assert sum(point.trace * point.steps for point in points) == pytest.approx(whole.trace * 1000)
    assert np.mean([p.low <= 10 + (p.first_step + p.last_step) / 40 <= p.high for p in points]) > 0.8
    assert NoiseAccumulator().newest().trajectory == ()


def test_steps_are_training_steps_where_a_pair_stands_for_several():
    accumulator = NoiseAccumulator(every=30)
    _, norms = rows(np.full(64, 20.0))
    for small, large in zip(*norms, strict=True):
        accumulator.update(small, large, SMALL, LARGE)
    found = accumulator.newest()
    assert (found.first_step, found.last_step, found.steps) == (32 * 30 + 1, 64 * 30, 32)
    assert found.trajectory[0].last_step == 8 * 30


def test_layers_are_of_the_same_steps():
    found = fed(np.repeat([10.0, 100.0], 400), layers=("a",)).newest()
    [layer] = found.layers
    assert found.first_step == 601
    assert layer.low <= 100 <= layer.high
    assert layer.steps == pytest.approx(found.steps, abs=16)


def test_in_examples_the_trajectory_is_too():
    found = fed(np.full(64, 40.0)).newest()
    tokens = type(found)(**{**found.__dict__, "unit": "tokens"})
    assert tokens.in_examples(4.0).trajectory[0].b_simple == pytest.approx(found.trajectory[0].b_simple / 4)
