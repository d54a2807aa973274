"""Anneals and averages: each length against a training by hand, with torch's own schedulers."""

import math
import sqlite3
from itertools import pairwise

import pytest
import torch
from cases.planted_training import planted_fit
from torch import nn
from torch.optim import lr_scheduler

from pybatch.base.errors import UsageError
from pybatch.scaling import Scaled
from pybatch.sweep.measurement import measure_convergence, measure_sweep
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.record import ruled_trials
from pybatch.training.choosing import choose
from pybatch.training.loop import Loop
from pybatch.training.schedules import GAMMA, next_length, tail
from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session, fixed_batches

CPU = torch.device("cpu")
RATE, BATCH = 0.05, 4


class Points(Workload):
    name, target, examples = "points", {"train": 0.6}, 64
    evaluation_examples = 64

    def model(self):
        return nn.Linear(6, 1)

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 6, generator=generator)
        return x, x.sum(1, keepdim=True) + 0.5 * torch.randn(n, 1, generator=generator)

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])


class Scheduled(Points):
    """Sets rates itself, and not by a factor; made for its own rate."""

    learning_rate = 0.2

    def schedule(self, optimizer, steps):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1)


def trial(schedule, lr=RATE, seed=0, optimizer="sgd"):
    return Trial("t", optimizer, Scaled({"lr": lr, "momentum": 0.9}), BATCH, seed, "fp32", "cpu", schedule)


def losses(replicas, lengths):
    found, before = [], 0
    for length in lengths:
        replicas.advance(length - before)
        found.append(replicas.evaluate())
        before = length
    return found


def by_hand(workload, steps, scheduler, seed=0, share=1.0):
    """The train loss after a training with torch's optimizer and scheduler."""
    session = Session(workload, CPU, "fp32", seed)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=RATE / share, momentum=0.9)
    schedule = scheduler(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        session.backward(session.batch(BATCH))
        for group in optimizer.param_groups:
            group["lr"] *= share
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] /= share
        schedule.step()
    return float(session.evaluate(fixed_batches(workload, CPU)[0]))


def wsd(optimizer, steps):
    end = tail(steps)
    return lr_scheduler.LambdaLR(optimizer, lambda t: 1 - math.sqrt(max(0, t - (steps - end)) / end) if end else 1.0)


def cosine(optimizer, steps):
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", cosine), ("wsd", wsd)])
def test_each_length_is_a_whole_training_of_its_own(schedule, theirs):
    replicas, why = choose(Points(), [trial(schedule), trial(schedule, seed=1)], CPU)
    assert why is None
    for length, (train, _) in zip((1, 7, 20), losses(replicas, (1, 7, 20)), strict=True):
        for seed in (0, 1):
            assert train[seed] == pytest.approx(by_hand(Points(), length, theirs, seed), rel=2e-4)


def test_a_schedule_of_ones_own_is_searched_though_it_sets_rates_itself():
    replicas, _ = choose(Scheduled(), [trial("own", lr=RATE)], CPU)
    [(train, _)] = losses(replicas, (12,))
    theirs = by_hand(Scheduled(), 12, Scheduled().schedule, share=RATE / 0.2)
    assert train[0] == pytest.approx(theirs, rel=2e-4)
    faster, _ = choose(Scheduled(), [trial("own", lr=4 * RATE)], CPU)
    assert losses(faster, (12,))[0][0][0] != pytest.approx(train[0], rel=1e-2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "average"])
def test_looking_changes_nothing_of_what_follows(schedule):
    often, _ = choose(Points(), [trial(schedule)], CPU)
    once, _ = choose(Points(), [trial(schedule)], CPU)
    assert losses(often, (3, 4, 9, 16))[-1] == losses(once, (16,))[-1]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "average"])
def test_others_that_end_change_nothing(schedule):
    both, _ = choose(Points(), [trial(schedule), trial(schedule, seed=1)], CPU)
    losses(both, (3,))
    both.keep([1])
    both.advance(6)
    alone, _ = choose(Points(), [trial(schedule, seed=1)], CPU)
    assert both.evaluate()[0] == losses(alone, (3, 9))[-1][0]


def test_the_average_is_of_the_newest_weights():
    """Against its weights in closed form: w_t counts for the share it had as it came, times what was left of it."""
    averaged, _ = choose(Points(), [trial("average")], CPU)
    plain = Loop(Points(), [trial("constant")], CPU)
    path = []
    for _ in range(15):
        plain.advance(1)
        path.append(plain.sessions[0].model.weight.detach().double().clone())
    shares = [(GAMMA + 1) / (t + GAMMA) for t in range(1, 16)]
    counts = [new * math.prod(1 - later for later in shares[i + 1 :]) for i, new in enumerate(shares)]
    assert sum(counts) == pytest.approx(1)
    mean = sum(c * w for c, w in zip(counts, path, strict=True))
    losses(averaged, (4, 15))
    torch.testing.assert_close(averaged._means[0][0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averaged.sessions[0].model.weight.double(), path[-1], rtol=0, atol=0)


def test_lengths_are_a_quarter_apart_where_each_costs_a_training():
    for schedule, most in (("constant", 1 / 16), ("average", 1 / 16), ("cosine", 1 / 4), ("wsd", 1 / 4)):
        steps = [0]
        while steps[-1] < 1000:
            steps.append(next_length(steps[-1], schedule))
        gaps = [(b - a) / a for a, b in pairwise(steps) if a > 20]
        assert 0.8 * most < max(gaps) <= most


@pytest.fixture(autouse=True)
def _no_fit(monkeypatch):
    """A fit resamples for seconds, and nothing here is about it."""
    monkeypatch.setattr("pybatch.sweep.summary.fit_steps", planted_fit)


def swept(**more):
    options = {"rates": [0.05], "base_rate": 0.05, "rules": ["constant"], "seeds": 1, "max_steps": 40}
    return measure_convergence(Points(), [4, 8], device="cpu", **(options | {"optimizer": "sgd"} | more))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "average"])
def test_a_sweep_under_a_schedule_says_so(schedule):
    found = swept(schedule=schedule)
    [curve] = found.curves
    assert found.schedule == schedule
    assert all(point.steps for point in curve.points)


def test_other_schedules_are_other_trials_and_other_experiments(tmp_path):
    options = {"batches": [4], "base_rate": 0.05, "rules": ["constant"], "seeds": 1, "max_steps": 30}
    store = tmp_path / "runs.db"
    runs = [
        measure_sweep(Points(), SweepOptions(**options, **more), device="cpu", store=store, resume=True)
        for more in ({}, {"schedule": "wsd"}, {"schedule": "constant"}, {})
    ]
    steps = [run.convergence for run in runs]
    assert steps[0].experiment == steps[2].experiment == steps[3].experiment != steps[1].experiment
    assert [s.schedule for s in steps] == ["constant", "wsd", "constant", "constant"]
    with sqlite3.connect(store) as db:
        trials = [Trial.from_spec(spec) for (spec,) in db.execute("SELECT spec FROM trial")]
    assert sorted(trial.schedule for trial in trials) == ["constant", "wsd"]
    assert steps[0].curves == steps[3].curves
    assert steps[0].changed == steps[3].changed  # nothing ran again


class Brought(Scheduled):
    def optimizer(self, params):
        return torch.optim.AdamW(params, lr=0.2, betas=(0.8, 0.9), weight_decay=0.1)


def test_a_sweep_takes_the_workloads_own_optimizer_and_schedule():
    given = {"seeds": 1, "base_rate": 0.1, "rules": ["constant"], "max_steps": 20, "device": "cpu"}
    found = measure_convergence(Brought(), [4], **given)
    assert (found.optimizer, found.schedule) == ("adamw", "own")
    assert found.optimizer_options["betas"] == "0.8/0.9"
    found = measure_convergence(Brought(), [4], **given, optimizer="sgd", schedule="constant")
    assert (found.optimizer, found.schedule) == ("sgd", "constant")


def test_beta2_and_decay_follow_the_batch_in_every_trial(tmp_path):
    store = tmp_path / "runs.db"
    found = measure_convergence(
        Points(),
        [2, 8],
        rules=["constant"],
        seeds=1,
        base_rate=0.05,
        max_steps=10,
        device="cpu",
        store=store,
        optimizer="adamw",
        options={"betas": (0.9, 0.96), "weight_decay": 0.1},
        beta2_rule="half-life",
        decay_rule="linear",
    )
    assert found.following == {"beta2": "half-life", "weight decay": "linear"}
    with sqlite3.connect(store) as db:
        trials = [Trial.from_spec(spec) for (spec,) in db.execute("SELECT spec FROM trial")]
    groups = {trial.batch: trial.scaled.group for trial in trials}
    assert groups[2]["betas"][1] == 0.96
    assert groups[8]["betas"][1] == pytest.approx(0.96**4)
    assert (groups[2]["weight_decay"], groups[8]["weight_decay"]) == pytest.approx((0.1, 0.4))


def test_a_sweeps_decay_follows_the_rate_of_its_rule():
    """As that of a batch-size schedule: B / (rate x decay) is the same at every batch size."""
    options = SweepOptions(
        batches=(2, 8), rules=("sqrt",), optimizer="adamw", options={"weight_decay": 0.1}, decay_rule="timescale"
    )
    [trial] = ruled_trials(options, "of", "cpu", "sqrt", 8, (0.05, None), [0])
    group = trial.scaled.group
    assert 8 / (group["lr"] * group["weight_decay"]) == pytest.approx(2 / (0.05 * 0.1))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"schedule": "own"}, "workload 'points' has none"),
        ({"optimizer": "own"}, "workload 'points' has none"),
        ({"beta2_rule": "half-life"}, "has no second beta"),
        ({"decay_rule": "linear"}, "has no weight decay"),
        ({"decay_rule": "timescale", "rules": ["sqrt", "tuned"]}, "rule 'tuned' gives none ahead"),
        ({"decay_rule": "lin"}, "decay rule 'lin' is not known"),
        ({"beta2_rule": "half-life", "optimizer": "adamw", "rules": ["adam-sde"]}, "sets the betas itself"),
    ],
)
def test_what_cannot_follow_or_anneal_is_refused(more, said):
    with pytest.raises(UsageError, match=said):
        swept(**more)
