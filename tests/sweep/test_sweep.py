"""Sweeps: curves from trials, the store's part in them, workers, and every bad input."""

import dataclasses
import itertools
import json
import math
import sqlite3
import subprocess
import sys
import types

import pytest
from cases.sweeps import D, Isotropic, measure
from torch import nn

import pybatch
from pybatch.base.errors import Interrupted, UsageError, WorkloadError
from pybatch.device.environment import capture
from pybatch.records import Convergence, NoiseScale, Run
from pybatch.sweep.measurement import measure_convergence
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.search import Grid, Sampled, best_rate, default_rates
from pybatch.sweep.store import Store
from pybatch.training.fingerprint import fingerprint
from pybatch.training.loop import Loop
from pybatch.training.trajectory import Crossing, Trajectory
from pybatch.training.trial import Study, Task
from pybatch.workloads.running.finding import find


class Broken(Isotropic):
    def loss(self, model, batch):
        raise KeyError("no such column")


class Small(Isotropic):
    """What a user may write: batches without replacement from too few examples; those of 512 evaluate."""

    def batch(self, n, generator, split="train"):
        if 8 < n < 512:
            raise IndexError(f"no {n} examples")
        return super().batch(n, generator, split)


class Normed(Isotropic):
    def model(self):
        return nn.Sequential(nn.Linear(D, 1), nn.BatchNorm1d(1))


def rows(path):
    db = sqlite3.connect(path)
    found = dict(db.execute("SELECT key, steps FROM trial"))
    db.close()
    return found


def expected_steps(batch, rate, target):
    """ln(target / start) over ln of the contraction (1 - rate)^2 + rate^2 (d + 1) / B, of E|e|^2."""
    return math.log(target / (0.125 * D)) / math.log((1 - rate) ** 2 + rate**2 * (D + 1) / batch)


def test_isotropic_regression_takes_the_steps_of_its_closed_form():
    """Smoothing delays every crossing by the same share, so the curve's shape and its critical batch remain."""
    found = measure(batches=[2, 4, 8, 16, 32], target={"train": 1e-4}, rates=[0.05 * 2**k for k in range(5)])
    [curve] = found.curves
    assert found.complete
    ratios = [p.steps / expected_steps(p.batch, p.learning_rate, 1e-4) for p in curve.points]
    assert all(0.85 < ratio < 1.35 for ratio in ratios)
    assert max(ratios) / min(ratios) < 1.25
    rates = [p.learning_rate for p in curve.points]
    assert rates[0] < rates[2] < rates[-1]


def test_every_rule_starts_at_the_tuned_base():
    found = measure(rules=["constant", "sqrt", "linear", "adascale", "tuned"])
    by_rule = {curve.rule: curve for curve in found.curves}
    base = by_rule["tuned"].points[0]
    for rule, curve in by_rule.items():
        assert curve.points[0].learning_rate == base.learning_rate
        assert curve.points[0].steps == pytest.approx(base.steps, rel=0.01), rule
    for rule, factor in (("constant", 1), ("sqrt", 8**0.5), ("linear", 8)):
        assert by_rule[rule].points[3].learning_rate == pytest.approx(factor * base.learning_rate)
    tuned = by_rule["tuned"].points[3].steps
    for curve in by_rule.values():
        assert curve.points[3].steps is None or tuned <= 1.05 * curve.points[3].steps


def test_one_store_answers_every_easier_target(tmp_path):
    path = tmp_path / "runs.db"
    measure(store=path)
    before = rows(path)
    again = measure(store=path, resume=True, target={"train": 0.4})
    assert set(before) <= set(rows(path))
    assert again.complete
    [curve] = again.curves
    assert all(p.status == "reached" for p in curve.points)
    fresh = measure(target={"train": 0.4})
    ours = [(p.learning_rate, p.steps) for p in curve.points]
    assert [s for _, s in ours] == pytest.approx([p.steps for p in fresh.curves[0].points], rel=0.02)


def test_resume_runs_only_what_is_missing(tmp_path):
    path = tmp_path / "runs.db"
    whole = measure(store=path)
    db = sqlite3.connect(path)
    with db:
        db.execute("DELETE FROM trial WHERE key IN (SELECT key FROM trial LIMIT 7)")
        db.execute("UPDATE trial SET created = '2020-01-01T00:00:00+00:00'")
    left = db.execute("SELECT count(*) FROM trial").fetchone()[0]
    again = measure(store=path, resume=True)
    kept = db.execute("SELECT count(*) FROM trial WHERE created = '2020-01-01T00:00:00+00:00'").fetchone()[0]
    assert kept >= left - 3
    assert db.execute("SELECT count(*) FROM trial").fetchone()[0] >= left + 7
    db.close()
    assert [p.steps for p in again.curves[0].points] == pytest.approx([p.steps for p in whole.curves[0].points])


def test_a_finished_sweep_trains_nothing_when_resumed(tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    whole = measure(store=path, rules=["tuned", "sqrt"])
    monkeypatch.setattr("pybatch.processes.workers.run_task", lambda *a, **k: pytest.fail("a trial was run"))
    again = measure(store=path, rules=["tuned", "sqrt"], resume=True)
    assert again == whole


def test_more_seeds_add_to_those_of_the_store(tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    batches = [4, 32]
    measure(batches=batches, store=path, seeds=3)
    before = {json.loads(s)["batch"]: set() for (s,) in sqlite3.connect(path).execute("SELECT spec FROM trial")}
    for (spec,) in sqlite3.connect(path).execute("SELECT spec FROM trial"):
        trial = json.loads(spec)
        before[trial["batch"]].add((trial["scaled"]["group"]["lr"], trial["seed"]))
    ran = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, outcome: (ran.append(outcome), put(self, outcome)))
    found = measure(batches=batches, store=path, seeds=5, resume=True)
    assert {len(rate.steps) for p in found.curves[0].points for rate in p.rates} == {5}
    assert {o.trial.seed for o in ran} >= {3, 4}
    again = [o for o in ran if (o.trial.lr, o.trial.seed) in before[o.trial.batch]]
    assert all(o.end != "met" or o.trial.seed >= 3 for o in again)  # none that had reached the target
    assert len(again) <= 0.2 * sum(map(len, before.values()))  # given up early, which five seeds give longer
    monkeypatch.undo()
    fresh = measure(batches=batches, seeds=5)
    assert [p.steps for p in found.curves[0].points] == [p.steps for p in fresh.curves[0].points]


def test_another_seed_repeats_the_experiment_independently():
    # In a race rates that are behind are given up, and have no steps to compare.
    seeds = {}, {"seed": 0}, {"seed": 50}
    first, again, other = (measure(batches=[4, 32], search="grid", **seed) for seed in seeds)
    # Stacked or one by one, which the machine's speed decides, gives losses that differ in their last digits.
    assert [p.steps for p in again.curves[0].points] == pytest.approx(
        [p.steps for p in first.curves[0].points], rel=0.02
    )
    own = [p.rates for p in first.curves[0].points]
    assert all(a.steps != b.steps for a, b in zip(own[0][1:3], other.curves[0].points[0].rates[1:3], strict=True))
    for p, q in zip(first.curves[0].points, other.curves[0].points, strict=True):
        assert q.steps == pytest.approx(p.steps, rel=0.4)


def test_a_store_that_holds_trials_is_not_used_unasked(tmp_path, monkeypatch):
    """Nor is a step run before that is said."""
    path = tmp_path / "runs.db"
    measure(batches=[4], store=path)
    monkeypatch.setattr("pybatch.sweep.measurement.check_start", lambda *_: pytest.fail("a step was run"))
    with pytest.raises(UsageError, match="--resume"):
        measure(batches=[4], store=path)


def test_a_batch_with_trials_in_other_hands_is_waited_for(tmp_path, monkeypatch):
    """Another process holds the claims; when it ends without an outcome, this one runs the trials."""
    path = tmp_path / "runs.db"
    other = Store(path, capture(seed=0))
    seen = []
    claim = Store.claim

    def first_to_the_other(self, keys):
        keys = list(keys)
        if not seen:
            seen.extend(claim(other, keys))
        return claim(self, keys)

    monkeypatch.setattr(Store, "claim", first_to_the_other)
    monkeypatch.setattr("pybatch.sweep.driver.time", types.SimpleNamespace(sleep=lambda _: other.close()))
    found = measure(batches=[8], store=path)
    assert len(seen) == 5  # the first seed at all rates
    assert found.complete


def test_ctrl_c_keeps_what_is_done(tmp_path):
    path = tmp_path / "runs.db"
    said = []

    def found(text):
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        measure(store=path, found=found)
    partial = stop.value.partial
    assert not partial.complete
    assert 1 <= len(partial.curves[0].points) < 4
    assert any("trials are missing of" in note.text for note in partial.notes)
    before = set(rows(path))
    assert before
    whole = measure(store=path, resume=True)
    assert whole.complete
    assert before <= set(rows(path))


def test_processes_give_what_this_process_gives(tmp_path):
    alone, path = measure(batches=[4, 16]), tmp_path / "runs.db"
    shared = measure(batches=[4, 16], jobs=2, store=path)
    for a, b in zip(alone.curves[0].points, shared.curves[0].points, strict=True):
        assert b.steps == pytest.approx(a.steps, rel=0.02)
    assert shared.complete
    assert len(rows(path)) == shared.trials


def test_a_killed_worker_has_its_trials_run_again(tmp_path, monkeypatch):
    from pybatch.processes.child import Child

    send, killed = Child.send, []

    def send_and_kill(self, message):
        send(self, message)
        if isinstance(message, Task) and not killed:
            killed.append(self)
            self.process.kill()

    monkeypatch.setattr(Child, "send", send_and_kill)
    path = tmp_path / "runs.db"
    found = measure(batches=[8], jobs=2, store=path)
    assert killed
    assert found.complete
    assert len(rows(path)) == found.trials


def test_a_worker_that_always_dies_is_said_and_the_rest_goes_on(monkeypatch):
    from pybatch.processes.child import Child

    send = Child.send

    def send_and_kill(self, message):
        send(self, message)
        if isinstance(message, Task) and message.trials[0].batch == 16:
            self.process.kill()

    monkeypatch.setattr(Child, "send", send_and_kill)
    found = measure(batches=[4, 16], jobs=2)
    assert not found.complete
    [curve] = found.curves
    assert [p.batch for p in curve.points] == [4]
    [note] = [n.text for n in curve.notes if "lost 3 times" in n.text]
    assert "batch 16" in note
    assert "SIGKILL, as where memory runs out" in note


@pytest.mark.parametrize(("ends", "said"), [("os._exit(7)", "exit status 7"), ("os.abort()", "SIGABRT")])
def test_how_a_worker_ended_is_said(ends, said):
    from pybatch.processes import workers

    done = subprocess.run([sys.executable, "-c", f"import os; {ends}"], stderr=subprocess.DEVNULL, check=False)
    assert said in workers._ending(done.returncode)


def test_the_record_reads_back(run):
    found = measure(batches=[4, 8, 16], rules=["constant", "tuned"])
    whole = Run(run.created, run.environment, convergence=found)
    back = Run.from_json(whole.to_json())
    assert back.convergence.curves == found.curves
    assert "512 examples in each fixed batch" in back.convergence.smoothing
    first = json.loads(whole.to_json())["convergence"]["curves"][0]
    assert {"rule", "split", "points", "s_min", "critical_batch", "low", "high", "regimes"} <= set(first)
    assert {"batch", "steps", "status", "seeds", "learning_rate"} <= set(first["points"][0])
    assert back.convergence.workload.target == {"train": 0.1}


def test_the_ratio_to_the_noise_scale_has_an_interval():
    noise = NoiseScale(16.0, 14.0, 18.0, 1.0, 16.0, "resolved", "test", 100)
    [curve] = measure(noise=noise).curves
    assert curve.noise_ratio == pytest.approx(16.0 / curve.critical_batch)
    if curve.low is not None and curve.high is not None:
        assert curve.noise_ratio_low < 16.0 / curve.high * 1.2
        assert curve.noise_ratio_low < curve.noise_ratio < curve.noise_ratio_high


def test_a_noise_scale_in_tokens_has_no_ratio_to_a_batch_in_examples():
    noise = NoiseScale(1600.0, 1400.0, 1800.0, 1.0, 1600.0, "resolved", "test", 100, unit="tokens")
    [curve] = measure(noise=noise).curves
    assert curve.critical_batch is not None
    assert curve.noise_ratio is None
    assert any("is in tokens" in note.text for note in curve.notes)
    [curve] = measure(noise=noise.in_examples(100.0)).curves
    assert curve.noise_ratio == pytest.approx(16.0 / curve.critical_batch)


def test_the_catalogue_has_it():
    assert pybatch.measure_convergence is measure_convergence


# Bad input.


def test_a_target_met_at_the_start_is_refused():
    with pytest.raises(UsageError, match=r"train=5 is met before the first step: the loss starts at .*lower"):
        measure(target={"train": 5.0})


def test_a_target_never_reached_is_said():
    found = measure(batches=[4, 8], target={"train": 0.0}, max_steps=40, rates=[0.01, 0.02, 0.04])
    [curve] = found.curves
    assert {p.status for p in curve.points} == {"not_reached"}
    assert curve.critical_batch is None
    assert any("Give a higher target, or more steps" in note.text for note in curve.notes)


def test_fixed_rules_without_a_base_are_said():
    found = measure(batches=[4, 8], rules=["sqrt"], target={"train": 0.0}, max_steps=40, rates=[0.01, 0.02, 0.04])
    [curve] = found.curves
    assert not curve.points
    assert not found.complete
    assert any("no rate reached the target at the base batch 4" in note.text for note in curve.notes)


def test_all_trials_diverged_is_said():
    assert {p.status for p in measure(batches=[4, 8], rates=[50.0, 100.0]).curves[0].points} == {
        "reached"
    }  # lower ones
    found = measure(batches=[4, 8], rates=[5e4, 1e5])
    [curve] = found.curves
    assert {p.status for p in curve.points} == {"diverged"}
    assert any("all trials diverged. Give lower learning rates" in note.text for note in curve.notes)


def test_one_batch_is_said():
    [curve] = measure(batches=[8]).curves
    assert curve.points[0].status == "reached"
    assert curve.critical_batch is None
    assert any("one batch size" in note.text for note in curve.notes)


def test_a_batch_larger_than_the_data_is_said():
    found = measure(batches=[8, 200])
    assert any("batch 200 is larger than the data set of 100" in note.text for note in found.notes)


def test_batch_norm_is_a_confound():
    found = measure(Normed(), batches=[16], max_steps=50)
    assert any("BatchNorm" in note.text for note in found.notes)


def test_a_workload_that_fails_is_named():
    with pytest.raises(WorkloadError, match="no such column"):
        measure(Broken())


def test_a_workload_that_fails_at_large_batches_keeps_the_others():
    found = measure(Small())
    [curve] = found.curves
    assert [p.batch for p in curve.points] == [4, 8]
    assert not found.complete
    assert {16, 32} == {b for b in (4, 8, 16, 32) if any(f"no {b} examples" in note.text for note in curve.notes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"batches": [0, 4]}, "at least one batch"),
        ({"rules": ["tuend"]}, "Did you mean 'tuned'"),
        ({"rules": []}, "no rule"),
        ({"rules": ["adam-sde"]}, "no betas"),
        ({"seeds": 0}, "seeds 0"),
        ({"optimizer": "sdg"}, "Did you mean 'sgd'"),
        ({"options": {"momentun": 0.9}}, "momentun"),
        ({"options": {"momentum": -1}}, "momentum"),
        ({"options": {"momentum": 5.0}, "rates": None}, "momentum 5"),
        ({"rates": [0.1, -1]}, "above 0"),
        ({"search": "bayes"}, "Known: cmaes, grid"),
        ({"target": {}}, "names no target"),
        ({"target": {"valid": 0.1}}, "target split 'valid'"),
        ({"target": {"train": math.nan}}, "give a number"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"jobs": 0}, "jobs 0"),
        ({"base_batch": 0}, "base batch 0"),
        ({"dtype": "fp8"}, "dtype"),
    ],
)
def test_what_is_refused_before_anything_runs(changes, message, tmp_path):
    path = tmp_path / "runs.db"
    with pytest.raises(UsageError, match=message):
        measure(**({"batches": [4, 8], "store": path} | changes))
    assert not path.exists()


# The search.


def raced(steps, lrs, seeds=(0,)):
    study = Study({"train": 0.1}, seeds, 10_000)
    for lr in lrs:
        if math.isfinite(steps(lr)):
            for seed in seeds:
                study.record("train", lr, seed, Crossing(steps(lr), 0, 1))
    return study


@pytest.mark.parametrize("optimum", [0.003, 0.7, 100.0])
def test_a_grid_finds_a_best_rate_within_it_or_beyond(optimum):
    def steps(lr):
        return 100 * (1 + math.log2(lr / optimum) ** 2)

    search, tried = Grid([2.0**k for k in range(-4, 4)]), []
    while new := search.next_rates(raced(steps, tried)):
        tried += new
    best = best_rate(raced(steps, tried), "train", tried)
    assert min(tried) < best < max(tried)
    assert abs(math.log2(best / optimum)) <= 0.3  # a quarter of a doubling, and rounding


def test_a_grid_that_only_extends_comes_to_an_end():
    search, tried = Grid([1.0, 2.0]), []
    while new := search.next_rates(raced(lambda lr: 1e6 / lr, tried)):
        tried += new
    assert len(tried) == 10


def test_optuna_searches_between_the_ends():
    pytest.importorskip("optuna")

    def steps(lr):
        return 100 * (1 + math.log2(lr / 0.7) ** 2)

    search, tried = Sampled("tpe", 0.01, 10.0, 24, seed=0), []
    while new := search.next_rates(raced(steps, tried)):
        tried += new
    assert 20 <= len(tried) <= 24
    assert all(0.01 <= lr <= 10 for lr in tried)
    assert 0.35 < best_rate(raced(steps, tried), "train", tried) < 1.4


def test_optuna_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'pybatch\[optuna\]'"):
        measure(search="tpe")


def test_ray_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'pybatch\[ray\]'"):
        measure(ray="auto")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_default_grids_are_powers_of_two(optimizer):
    rates = default_rates(optimizer, {"lr": 1e-3})
    assert len(rates) >= 12
    assert all(math.log2(rate).is_integer() for rate in rates)


def test_a_fingerprint_shows_the_data_and_the_model():
    class Other(Isotropic):
        def batch(self, n, generator, split="train"):
            x, y = super().batch(n, generator, split)
            return x, y + 0.01

    same = fingerprint(find("digits"))
    assert fingerprint(find("digits")) == same
    assert fingerprint(find("digits", model="cnn")) != same
    hashes = [
        {k: v for k, v in json.loads(fingerprint(w())).items() if k in ("data", "init")} for w in (Isotropic, Other)
    ]
    assert hashes[0]["data"] != hashes[1]["data"]
    assert hashes[0]["init"] == hashes[1]["init"]


def test_a_fingerprint_shows_what_is_in_the_loss_alone():
    class Smooth(Isotropic):
        def __init__(self, smoothing):
            self.smoothing = smoothing

    assert fingerprint(Smooth(0.1)) != fingerprint(Smooth(0.2))
    assert fingerprint(Smooth(0.1)) == fingerprint(Smooth(0.1))
    still = [fingerprint(find("quadratic", options=["noise=0", f"spectrum={s}"])) for s in (1, 0.5)]
    assert still[0] != still[1]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lamb", "lars", "lion", "muon", "sgd"])
def test_every_optimizer_can_be_swept(optimizer):
    found = measure(batches=[8], optimizer=optimizer, rates=[0.01, 0.02], seeds=1, max_steps=3)
    assert found.curves[0].points[0].rates


def test_muon_shares_one_rate_with_adamw_and_a_second_one_is_refused():
    found = measure(batches=[8], optimizer="muon", rates=[0.05], seeds=1, max_steps=3)
    assert any("embeddings" in note.text for note in found.notes)
    with pytest.raises(UsageError, match=r"adamw_lr=0.1 is a second rate"):
        measure(batches=[8], optimizer="muon", options={"adamw_lr": 0.1})


def test_an_optimizers_arguments_reach_the_trials(tmp_path):
    path = tmp_path / "runs.db"
    measure(batches=[8], options={"momentum": 0.5, "max_grad_norm": 3.0}, store=path)
    db = sqlite3.connect(path)
    specs = [json.loads(spec) for (spec,) in db.execute("SELECT spec FROM trial")]
    db.close()
    assert {spec["scaled"]["group"]["momentum"] for spec in specs} == {0.5}
    assert {spec["scaled"]["group"]["max_grad_norm"] for spec in specs} == {3.0}  # no part of a parameter group
    assert {spec["seed"] for spec in specs} == {0, 1, 2}


def test_adam_sde_is_measured_up_to_its_end():
    found = measure(
        batches=[4, 8, 64, 128],
        rules=["adam-sde"],
        optimizer="adamw",
        rates=[0.02, 0.05, 0.1],
        options={"betas": (0.8, 0.9)},
    )
    [curve] = found.curves
    assert [p.batch for p in curve.points] == [4, 8]
    [note] = [note.text for note in curve.notes if "ends at batch" in note.text]  # said once for all of them
    assert note.startswith("batch 64, 128: rule 'adam-sde' ends at batch 20, above which")
    assert dataclasses.asdict(curve.points[0])["status"] == "reached"


# What is said on the way.


def test_rows_on_the_way_are_a_table_of_80_columns():
    said = []
    measure(batches=[4, 8], rules=["sqrt", "tuned"], target={"train": 0.1, "test": 0.1}, found=said.append)
    assert " ".join(said[0].split()) == "batch rule steps to train 0.100 steps to test 0.100"
    assert [line.split()[:2] for line in said[1:3]] == [["4", "tuned"], ["8", "tuned"]]
    assert len(said) == 1 + 2 + 4
    assert all("(3/3) at" in line for line in said[1:])
    assert max(len(f"pybatch: {line}") for line in said) <= 80


def test_an_unreachable_target_is_tried_at_both_ends_only_and_its_distance_is_said():
    said = []
    found = measure(
        batches=[4, 8, 16, 32], target={"train": 1e-30}, rates=[0.05, 0.1, 0.2], max_steps=40, found=said.append
    )
    [curve] = found.curves
    assert [p.batch for p in curve.points] == [4, 32]
    assert not found.complete
    assert any("batch 8, 16: not run: neither batch 4 nor 32" in note.text for note in curve.notes)
    near = [note.text for note in curve.notes if "the lowest train loss was" in note.text]
    assert len(near) == 1
    assert any("the lowest train loss was" in line for line in said)
    assert not any("diverged" in note.text for note in curve.notes)  # a seed that was not run is no failure
    # The first seed at three rates, and two more past an edge where the loss came lowest; the others at the nearest.
    assert all(p.runs in (5, 7, 9, 11, 13) for p in curve.points)


def test_a_target_that_only_large_batches_reach_is_sought_at_all():
    """At batch 1 the rate must be so low that 60 steps do not suffice; every other batch size is still run."""
    found = measure(batches=[1, 8, 32], target={"train": 0.03}, rates=[0.02, 0.04, 0.08, 0.4, 0.8], max_steps=40)
    [curve] = found.curves
    assert [p.status for p in curve.points] == ["not_reached", "reached", "reached"]


def test_a_race_gives_the_rates_of_the_grid_for_fewer_trials():
    rates = [0.0125 * 2**k for k in range(8)]
    grid, race = (measure(batches=[4, 32], rates=rates, search=search) for search in ("grid", "race"))
    for a, b in zip(grid.curves[0].points, race.curves[0].points, strict=True):
        assert (a.learning_rate, a.steps, a.reached) == (b.learning_rate, b.steps, b.reached)
    assert race.trials < 0.75 * grid.trials


class Failing(Isotropic):
    """Fails on the way, in stacked trials as in single ones: after 300 losses in training."""

    def __init__(self):
        self._seen = 0

    def loss(self, model, batch):
        self._seen += model.training
        if self._seen > 300:
            raise ValueError("label 7 is out of range")
        return super().loss(model, batch)


class Nowhere(Isotropic):
    def loss(self, model, batch):
        return super().loss(model, batch) * math.nan


def test_what_a_workload_raises_on_the_way_is_named_and_what_was_run_is_kept(tmp_path):
    path = tmp_path / "runs.db"
    rates = [0.05, 0.1, 0.2, 0.4, 1e6]
    found = measure(Failing(), store=path, rates=rates, seeds=1, target={"train": 1e-9})
    assert not found.complete
    why = "Failing.loss() of workload 'isotropic' raised ValueError: label 7"
    assert any(why in note.text for note in found.curves[0].notes)
    assert len(rows(path)) >= 1  # the rate that diverges


def test_a_loss_that_is_nan_from_the_start_is_the_workloads_fault_and_not_its_rates():
    with pytest.raises(WorkloadError, match=r"Nowhere.loss\(\) .* returned nan .* before the first step"):
        measure(Nowhere())


def test_a_trial_that_is_given_up_ends_at_the_cap(tmp_path):
    path = tmp_path / "runs.db"
    found = measure(store=path, max_steps=101, target={"train": 1e-30}, rates=[0.05, 0.1], batches=[4, 32])
    trained = [Trajectory.decompressed(*row) for row in columns(path)]
    early = [one for one in trained if one.steps[-1] != 101]
    assert all(one.steps[-1] < 101 and not one.train[-1] <= 3 * one.train[0] for one in early)  # they diverged
    assert len(early) < len(trained) / 2
    assert any("within 101 steps" in note.text for note in found.curves[0].notes)


def columns(path):
    db = sqlite3.connect(path)
    found = db.execute("SELECT steps, train, test FROM trial").fetchall()
    db.close()
    return found


def test_the_noise_scale_is_measured_once_all_else_is_found_good(tmp_path):
    path, calls = tmp_path / "runs.db", []
    measure(batches=[8], seeds=1, store=path, noise=lambda: calls.append(1))
    assert calls == [1]
    for wrong in ({"store": path}, {"store": tmp_path / "no" / "runs.db"}, {"rules": ["cubic"]}, {"jobs": 0}):
        with pytest.raises(UsageError):
            measure(batches=[8], noise=lambda: calls.append(2), **wrong)
    assert calls == [1]


def test_ctrl_c_during_the_fits_keeps_the_sweep(monkeypatch):
    from pybatch.sweep.driver import Sweep

    result, calls = Sweep.record, []

    def once(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result(self)

    monkeypatch.setattr(Sweep, "record", once)
    with pytest.raises(Interrupted) as stop:
        measure()
    assert len(stop.value.partial.curves[0].points) == 4


@pytest.mark.parametrize(("store", "says"), [(None, "no trial was stored"), ("runs.db", "go on with --resume")])
def test_an_interrupted_sweep_says_what_of_it_is_kept(monkeypatch, store, says):
    import pybatch.jobs.sweep

    def stopped(*_, **__):
        raise Interrupted(Run("", None, convergence=Convergence((), complete=False), complete=False))

    monkeypatch.setattr(pybatch.jobs.sweep, "measure_sweep", stopped)
    with pytest.raises(Interrupted) as stop:
        pybatch.jobs.sweep.run_sweep(Isotropic(), SweepOptions(batches=[4]), device="cpu", noise_budget=0, store=store)
    assert says in stop.value.partial.notes[-1].text


def test_why_trials_were_not_stacked_is_said_once(monkeypatch):
    calls = itertools.count()

    def choose(workload, trials, device, how):
        return Loop(workload, trials, device), f"not stacked: losses differ ({next(calls)}, 7)"

    monkeypatch.setattr("pybatch.training.task.choose", choose)
    found = measure(batches=[4, 16])
    notes = [note.text for curve in found.curves for note in (*found.notes, *curve.notes) if note.figure == "trials"]
    assert next(calls) > 1
    assert notes == ["not stacked: losses differ (0, 7)"]
