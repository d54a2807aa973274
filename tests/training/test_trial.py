"""Trajectories, crossings and races: what decides when a target was reached, without any training."""

import math

import numpy as np
import pytest

from pybatch.base.errors import UsageError
from pybatch.scaling import Scaled
from pybatch.sweep.search import best_rate
from pybatch.training.trajectory import Trajectory, next_evaluation, smoothed
from pybatch.training.trial import Outcome, Study, Trial, diverged, middle


def evaluations(last):
    steps = [0]
    while steps[-1] < last:
        steps.append(next_evaluation(steps[-1]))
    return np.array(steps, dtype=np.int32)


def trajectory(loss, last=2000):
    steps = evaluations(last)
    values = np.array([loss(t) for t in steps], dtype=np.float32)
    return Trajectory(steps, values, values * 2)


def trial(lr=0.5, seed=0, batch=8):
    return Trial("w", "sgd", Scaled({"lr": lr}), batch, seed, "fp32", "cpu")


def outcome(lr, seed, decay, end="met", last=2000):
    return Outcome(trial(lr, seed), end, trajectory(lambda t: math.exp(-t / decay), last), 0.0)


def test_evaluations_are_dense_first_and_then_a_share_apart():
    steps = evaluations(5000)
    assert steps[:17].tolist() == list(range(17))
    gaps = np.diff(steps)
    assert (gaps <= np.maximum(1, steps[:-1] / 16)).all()
    assert len(steps) < 130


@pytest.mark.parametrize("decay", [3.0, 20.0, 300.0])
def test_a_crossing_is_where_the_smoothed_loss_is_the_target(decay):
    """exp(-t / decay) averaged over the last fifth of t has a closed form."""
    found = trajectory(lambda t: math.exp(-t / decay)).crossing("train", 0.1)
    grid = np.arange(1, 2000)
    start = 0.8 * grid
    mean = decay * (np.exp(-start / decay) - np.exp(-grid / decay)) / (0.2 * grid)
    exact = grid[np.argmax(mean <= 0.1)]
    assert found.before < found.steps <= found.at
    assert found.steps == pytest.approx(exact, rel=0.04, abs=2)


def test_smoothing_delays_by_the_same_share_at_every_speed():
    """A delay in steps would inflate the fewest steps, and with it the critical batch; a share of them cannot."""
    ratios = []
    for decay in (100.0, 200.0, 400.0):
        found = trajectory(lambda t, decay=decay: math.exp(-t / decay), 4000).crossing("train", 0.1)
        ratios.append(found.steps / (decay * math.log(10)))
    assert max(ratios) / min(ratios) < 1.03


def test_one_lucky_evaluation_is_no_crossing():
    base = trajectory(lambda t: 1.0)
    losses = base.train.copy()
    losses[60] = 0.05
    assert Trajectory(base.steps, losses, losses).crossing("train", 0.1) is None


def test_a_target_met_at_the_start_takes_no_step():
    found = trajectory(lambda t: 0.05).crossing("train", 0.1)
    assert (found.steps, found.at) == (0.0, 0)


def test_nan_is_not_below_a_target():
    base = trajectory(lambda t: float("nan") if t > 50 else 1.0)
    assert base.crossing("train", 2.5e-1) is None


def test_the_limit_ends_the_search_for_a_crossing():
    found = trajectory(lambda t: math.exp(-t / 300)).crossing("train", 0.1)
    again = trajectory(lambda t: math.exp(-t / 300))
    assert again.crossing("train", 0.1, found.steps) == found
    assert again.crossing("train", 0.1, found.steps - 1) is None


def test_the_first_steps_are_smoothed_too():
    steps = evaluations(40)
    values = np.arange(len(steps), dtype=np.float64)
    assert smoothed(steps, values, 0) == 0
    assert smoothed(steps, values, 1) == 1
    assert smoothed(steps, values, 10) == pytest.approx(9.5)  # steps 9 and 10


def test_compressed_columns_read_back_equal():
    base = trajectory(lambda t: math.exp(-t / 50))
    base.train[-1] = np.nan
    back = Trajectory.decompressed(*base.compressed())
    for a, b in ((back.steps, base.steps), (back.train, base.train), (back.test, base.test)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_damaged_columns_are_refused():
    steps, train, test = trajectory(lambda t: 1.0).compressed()
    with pytest.raises(UsageError, match="damaged"):
        Trajectory.decompressed(steps, train[:-3], test)
    with pytest.raises(UsageError, match="different length"):
        Trajectory.decompressed(trajectory(lambda t: 1.0, 10).compressed()[0], train, test)


def test_a_trial_is_named_by_all_that_defines_it():
    keys = {
        trial().key,
        trial(lr=0.6).key,
        trial(seed=1).key,
        trial(batch=9).key,
        Trial("v", "sgd", Scaled({"lr": 0.5}), 8, 0, "fp32", "cpu").key,
        Trial("w", "adamw", Scaled({"lr": 0.5}), 8, 0, "fp32", "cpu").key,
        Trial("w", "sgd", Scaled({"lr": 0.5, "momentum": 0.9}), 8, 0, "fp32", "cpu").key,
        Trial("w", "sgd", Scaled({"lr": 0.5}, 10, 0.1), 8, 0, "fp32", "cpu").key,
        Trial("w", "sgd", Scaled({"lr": 0.5}, gain_batch=4), 8, 0, "fp32", "cpu").key,
        Trial("w", "sgd", Scaled({"lr": 0.5}), 8, 0, "bf16", "cpu").key,
        Trial("w", "sgd", Scaled({"lr": 0.5}), 8, 0, "fp32", "cuda").key,
    }
    assert len(keys) == 11
    assert Trial.from_spec(trial().spec).key == trial().key


def test_a_longer_run_answers_a_higher_target_and_not_a_lower_one():
    run = outcome(0.5, 0, 100.0, last=300)  # exp(-3) = 0.05
    assert run.answers({"train": 0.1}, {"train": 5000})
    assert not run.answers({"train": 0.01}, {"train": 5000})
    assert run.answers({"train": 0.01}, {"train": run.steps})  # given up there anyway
    assert Outcome(trial(), "diverged", run.trajectory, 0.0).answers({"train": 0.01}, {"train": 5000})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3], 3),
        ([1, 3], 2),
        ([3, math.inf], 3),
        ([1, 2, math.inf], 2),
        ([1, math.inf, math.inf], math.inf),
        ([], math.inf),
    ],
)
def test_half_of_the_seeds_must_reach(values, expected):
    assert middle(values) == expected


def test_a_race_ends_the_slow_rates_and_never_the_best():
    study = Study({"train": 0.1}, (0, 1, 2), cap=10_000)
    assert study.limit("train") == 10_000
    for seed, decay in enumerate((100, 105, 95)):
        study.take(outcome(0.5, seed, decay))
    best = study.median("train", 0.5)
    assert study.limit("train") == pytest.approx(1.5 * best)
    study.take(outcome(0.1, 0, 200))  # twice the steps: past the limit
    assert study.steps("train", 0.1, 0) is None
    assert study.steps("train", 0.5, 0) is not None
    assert study.over(0.1, 1, math.ceil(1.5 * best))
    assert not study.over(0.1, 1, math.floor(best))


def test_a_single_seed_does_not_end_a_race_of_three():
    study = Study({"train": 0.1}, (0, 1, 2), cap=10_000)
    study.take(outcome(0.5, 0, 10))
    assert study.limit("train") == 10_000


def test_a_run_that_never_reaches_serves_a_rate_no_better_than_one_that_is_late():
    study = Study({"train": 0.1}, (0, 1), cap=10_000)
    study.take(outcome(0.1, 0, 90))
    assert best_rate(study, "train", [0.1, 0.5]) == 0.1  # half of the seeds, and no rate does better
    for seed in study.seeds:
        study.take(outcome(0.5, seed, 100))
    assert best_rate(study, "train", [0.1, 0.5]) == 0.5


def test_without_a_search_the_cap_alone_counts():
    study = Study({"train": 0.1}, (0,), cap=700, search=False)
    study.take(outcome(0.5, 0, 10))
    assert study.limit("train") == 700


def test_divergence_waits_for_the_warm_up():
    assert diverged(3, math.nan, 2.3, 0)
    assert not diverged(10, 20.0, 2.3, 0)  # an overshoot of the first steps
    assert diverged(100, 7.0, 2.3, 0)
    assert not diverged(100, 7.0, 2.3, 90)
    assert not diverged(100, 6.8, 2.3, 0)


def test_one_of_two_seeds_does_not_cut_the_other_off():
    study = Study({"train": 0.1}, (0, 1), cap=10_000)
    study.take(outcome(0.5, 0, 100))
    assert study.limit("train") == 10_000
    study.take(outcome(0.5, 1, 200))
    assert study.steps("train", 0.5, 1) is not None
    assert study.limit("train") == pytest.approx(1.5 * study.steps("train", 0.5, 1).steps)
