"""Targets by the name of a metric: reached from its own side, kept in the store, said in the record."""

import dataclasses
import math
import sqlite3

import numpy as np
import pytest
import torch
from cases.planted_training import planted_fit
from torch import nn

from pybatch import Run, Workload
from pybatch.base.errors import UsageError, WorkloadError
from pybatch.report.formats.text import render
from pybatch.scaling import Scaled
from pybatch.sweep.archive import read_store
from pybatch.sweep.measurement import measure_sweep
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.summary import nearest
from pybatch.training.trajectory import Metric, Trajectory, lowest, ordered
from pybatch.training.trial import Outcome, Trial


class Blobs(Workload):
    """Two classes in the plane; accuracy is counted by hand."""

    name, target = "blobs", {"test:accuracy": 0.9}
    better = {"accuracy": "higher", "error": "lower"}  # noqa: RUF012
    evaluation_examples = 200

    def model(self):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, n, generator, split="train"):
        y = torch.randint(2, (n,), generator=generator)
        return torch.randn(n, 2, generator=generator) + 1.5 * (2.0 * y[:, None] - 1), y

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        assert not model.training
        right = (model(batch[0]).argmax(1) == batch[1]).float().mean()
        return {"accuracy": right, "error": 1 - float(right)}


@pytest.fixture(autouse=True)
def _no_fit(monkeypatch):
    monkeypatch.setattr("pybatch.sweep.summary.fit_steps", planted_fit)


OPTIONS = {"batches": [4, 8], "rules": ["constant"], "base_rate": 0.02, "seeds": 2, "max_steps": 60}


def swept(store=None, workload=None, **more):
    options = SweepOptions(**(OPTIONS | more))
    return measure_sweep(workload or Blobs(), options, device="cpu", store=store, resume=store is not None)


def test_a_metric_is_reached_from_its_own_side(tmp_path):
    run = swept(tmp_path / "a.db", target={"train": 0.3, "test:accuracy": 0.9, "test:error": 0.1})
    curves = {curve.split: curve for curve in run.convergence.curves}
    assert list(curves) == ["train", "test:accuracy", "test:error"]
    assert [curves[name].higher for name in curves] == [False, True, False]
    steps = {name: [p.steps for p in curve.points] for name, curve in curves.items()}
    assert steps["test:accuracy"] == steps["test:error"]
    assert all(0 < s < 60 for s in steps["test:accuracy"])
    text = " ".join(render(run, "md").split())
    assert "Steps to test accuracy ≥ 0.900" in text
    assert "Steps to test error ≤ 0.100" in text
    assert "Steps to train loss 0.300" in text
    assert Run.from_json(run.to_json()).convergence.curves == run.convergence.curves
    with sqlite3.connect(tmp_path / "a.db") as db:
        rows = db.execute("SELECT steps, train, test, metrics FROM trial").fetchall()
    kept = [Trajectory.decompressed(*row) for row in rows]
    for found in kept:
        accuracy, error = (found.metrics[f"test:{name}"].values for name in ("accuracy", "error"))
        np.testing.assert_allclose(accuracy, 1 - error, atol=1e-6)
        first = next(i for i, value in enumerate(accuracy) if value >= 0.9)
        assert found.crossing("test:accuracy", 0.9).at >= found.steps[first]  # smoothed: not before


def test_other_targets_of_a_store_are_read_from_its_losses_and_what_was_not_kept_is_missing(tmp_path):
    store = tmp_path / "a.db"
    swept(store)
    [again] = read_store(store, {"test:accuracy": 0.8})
    [curve] = again.convergence.curves
    assert again.convergence.complete
    assert all(p.steps for p in curve.points)
    [other] = read_store(store, {"test:error": 0.1})  # what was named beside it was kept, too
    assert all(p.steps for c in other.convergence.curves for p in c.points)
    swept(tmp_path / "b.db", target={"train": 0.3})
    [lost] = read_store(tmp_path / "b.db", {"test:error": 0.1})
    assert not lost.convergence.complete
    assert not [p for c in lost.convergence.curves for p in c.points]


def test_trials_of_another_target_are_run_again_where_they_kept_no_metric(tmp_path):
    store = tmp_path / "a.db"
    before = swept(store, target={"train": 0.3})
    after = swept(store, target={"test:accuracy": 0.9})
    assert all(p.steps for curve in after.convergence.curves for p in curve.points)
    assert after.convergence.complete
    again = swept(store, target={"train": 0.3})
    # A stack or a loop trains them, whichever is faster at that moment: they differ by rounding.
    for one, other in zip(points(again), points(before), strict=True):
        assert dataclasses.replace(one, other_losses=()) == dataclasses.replace(other, other_losses=())
        assert one.other_losses == pytest.approx(other.other_losses, rel=1e-5)


def points(run):
    return [point for curve in run.convergence.curves for point in curve.points]


def test_the_best_of_a_metric_is_its_highest():
    values = np.array([0.2, 0.5, 0.4], dtype=np.float32)
    steps = np.array([0, 10, 20], dtype=np.int32)
    metrics = {"test:accuracy": Metric(values, True), "test:error": Metric(values, False)}
    found = Trajectory(steps, values, values, metrics)
    assert lowest(found, "test:accuracy") == (pytest.approx(-0.5), 10)
    assert lowest(found, "test:error") == (pytest.approx(0.2), 0)
    assert found.crossing("test:accuracy", 0.45).at == 10
    assert found.crossing("test:accuracy", 0.6) is None
    assert found.crossing("test:accuracy", -math.inf) is None  # a target that lets a run go on
    assert found.crossing("test:error", 0.6).at == 0
    with pytest.raises(UsageError, match="kept no test:f1"):
        found.crossing("test:f1", 0.5)
    again = Trajectory.decompressed(*found.compressed(), found.compressed_metrics())
    assert again.metrics["test:accuracy"].higher
    np.testing.assert_array_equal(again.metrics["test:error"].values, values)
    outcome = Outcome(Trial("w", "sgd", Scaled({"lr": 0.1}), 8, 0, "fp32", "cpu"), "capped", found, 0.0)
    assert nearest("test:accuracy", [outcome]).startswith("the best test accuracy was 0.500")


def test_targets_stand_in_one_order():
    assert ordered(["test:b", "test", "train:z", "train", "test:a"]) == ["train", "test", "train:z", "test:a", "test:b"]


def other(**attributes):
    return type("Other", (Blobs,), attributes)()


@pytest.mark.parametrize(
    ("workload", "target", "error", "said"),
    [
        (other(), {"test:f1": 0.9}, UsageError, "does not say which way f1 goes"),
        (other(better={"f1": "higher"}), {"test:f1": 0.9}, WorkloadError, "returned accuracy, error, and .* 'f1'"),
        (other(better={"accuracy": "up"}), {"test:accuracy": 0.9}, WorkloadError, "'higher' or 'lower'"),
        (other(metrics=lambda self, model, batch: [1]), {"test:error": 0.1}, WorkloadError, "returned list"),
        (other(), {"test:accuracy": 0.1}, UsageError, "the accuracy starts at .* Give a higher target"),
        (other(), {"test:error": 0.9}, UsageError, "the error starts at .* Give a lower target"),
        (other(), {"valid:accuracy": 0.9}, UsageError, "target split 'valid' is not known"),
    ],
)
def test_what_is_no_metric_to_reach_is_refused(workload, target, error, said):
    with pytest.raises(error, match=said):
        swept(workload=workload, target=target)


def test_metrics_of_parts():
    work = Workload.from_parts(
        model=Blobs().model,
        train=[(torch.zeros(2), 0)] * 8,
        loss=nn.CrossEntropyLoss(),
        metrics=lambda model, batch: {"zeros": float((batch[1] == 0).float().mean())},
        better={"zeros": "higher"},
        target={"train:zeros": 0.5},
    )
    assert work.metrics(work.model(), work.batch(4, torch.Generator())) == {"zeros": 1.0}
    assert (work.better, work.target) == ({"zeros": "higher"}, {"train:zeros": 0.5})
