"""A store read back: the record of the sweep that wrote it, without torch, and every store that is none."""

import json
import math
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report as planted
import typer.testing
from cases.planted_training import planted_training

import pybatch
from pybatch import cli
from pybatch.answer.merge import join
from pybatch.base import numerals
from pybatch.base.errors import Interrupted, UsageError
from pybatch.sweep.archive import read_store
from pybatch.sweep.search import Grid
from pybatch.training.trajectory import Trajectory, crossing_at, next_evaluation
from pybatch.workloads.running.finding import find

runner = typer.testing.CliRunner()
BATCHES = (8, 32, 128, 512)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "runs.db"
    planted.plant(path, BATCHES)
    return path


@pytest.fixture
def copy(store, tmp_path):
    return Path(shutil.copy(store, tmp_path / "copy.db"))


def change(path, statement, *values):
    db = sqlite3.connect(path)
    db.execute(statement, values)
    db.commit()
    db.close()


def test_the_record_is_that_of_the_sweep(tmp_path):
    path = tmp_path / "runs.db"
    arguments = {"device": "cpu", "seeds": 2, "rates": [0.25, 0.5, 1.0], "target": {"train": 0.3}, "store": path}
    live = pybatch.measure_convergence(find("quadratic"), [4, 16, 64], ["tuned", "sqrt", "linear"], **arguments)
    [run] = read_store(path)
    read = run.convergence
    assert read == live
    assert run.complete
    assert run.environment is not None


def test_planted_steps_and_rates_come_back(store):
    [run] = read_store(store)
    curve = next(c for c in run.convergence.curves if (c.rule, c.split) == ("tuned", "train"))
    for p in curve.points:
        assert p.learning_rate == planted.best_rate(p.batch)
        assert p.steps == pytest.approx(planted.S_MIN * (1 + planted.CRITICAL / p.batch), rel=0.25)
    assert curve.low <= planted.CRITICAL <= curve.high
    assert {c.rule for c in run.convergence.curves} == {"tuned", "sqrt", "linear"}
    assert all(len(c.points) == len(BATCHES) for c in run.convergence.curves)


def test_the_file_is_only_read(store):
    before = store.read_bytes()
    read_store(store)
    assert store.read_bytes() == before
    assert [p.name for p in store.parent.iterdir()] == ["runs.db"]


def test_each_experiment_is_a_run_and_a_resumed_sweep_is_none_of_its_own(copy):
    planted.plant(copy, BATCHES[:3], optimizer="adamw")
    planted.plant(copy, (8, 2048), rules=("tuned",))
    runs = {run.convergence.optimizer: run.convergence for run in read_store(copy)}
    assert set(runs) == {"sgd", "adamw"}
    tuned = next(c for c in runs["sgd"].curves if c.rule == "tuned")
    assert [p.batch for p in tuned.points] == [*BATCHES, 2048]
    assert len(runs["adamw"].curves[0].points) == 3


def test_another_target_is_read_from_the_same_losses(store):
    [run] = read_store(store, {"train": 0.5})
    [curve] = [c for c in run.convergence.curves if c.rule == "tuned"]
    [own] = [c for c in read_store(store)[0].convergence.curves if (c.rule, c.split) == ("tuned", "train")]
    share = np.log(2.3 / 0.5) / np.log(2.3 / 0.1)  # of exponential losses
    for p, q in zip(curve.points, own.points, strict=True):
        assert p.steps == pytest.approx(share * q.steps, rel=0.1)
    assert run.convergence.workload.target == {"train": 0.5}


def test_what_is_missing_is_said(copy):
    [(key, spec)] = sqlite3.connect(copy).execute("SELECT key, spec FROM trial LIMIT 1").fetchall()
    batch = json.loads(spec)["batch"]
    keys = [
        k for k, s in sqlite3.connect(copy).execute("SELECT key, spec FROM trial") if json.loads(s)["batch"] == batch
    ]
    for key in keys:
        change(copy, "DELETE FROM trial WHERE key = ?", key)
    [run] = read_store(copy)
    assert not run.complete
    assert any(f"trials are missing of batch {batch} tuned" in note.text for note in run.convergence.notes)


def test_a_seed_that_has_not_run_is_missing(copy):
    for key, spec in sqlite3.connect(copy).execute("SELECT key, spec FROM trial").fetchall():
        if json.loads(spec)["seed"] == 2:
            change(copy, "DELETE FROM trial WHERE key = ?", key)
    [run] = read_store(copy)
    assert not run.complete
    assert run.convergence.seeds == 3
    assert {p.reached for p in run.convergence.curves[0].points} == {2}


@pytest.mark.parametrize(
    ("statement", "cause"),
    [
        ("PRAGMA application_id = 7", "another program"),
        ("PRAGMA user_version = 9", r"^store '[^']*' has schema 9, this pybatch reads 4\. A later pybatch [^.]*\.$"),
        ("UPDATE trial SET steps = x'00'", "cannot be read"),
        ("UPDATE trial SET spec = '{}'", "is damaged"),
        ("UPDATE sweep SET json = '[]'", "is damaged"),
        ("UPDATE sweep SET json = '{\"subject\": {}}'", "is damaged: sweep 1: subject is incomplete"),
        ("UPDATE sweep SET json = json_set(json, '$.options.dummy', 1)", "is damaged: .*dummy"),
        ("UPDATE sweep SET noise = '{}'", "is damaged: sweep 1: noise is incomplete"),
        ("DELETE FROM store", "is damaged"),
        ("DROP TABLE trial", "cannot be read: no such table"),
        ("DELETE FROM trial", None),
    ],
)
def test_a_store_that_cannot_be_read_is_named(copy, statement, cause):
    change(copy, statement)
    if cause is None:  # a sweep that has only begun
        [run] = read_store(copy)
        assert not run.complete
        return
    with pytest.raises(UsageError, match=cause) as raised:
        read_store(copy)
    assert "store" in str(raised.value)


def test_a_cut_file_is_named(copy):
    copy.write_bytes(copy.read_bytes()[:-6000])
    with pytest.raises(UsageError, match=r"copy\.db' (is damaged|cannot be read)"):
        read_store(copy)


def test_report_writes_a_store_in_every_format_without_torch(store, tmp_path):
    endings = ("html", "md", "csv", "jsonl", "json", "txt")
    code = (
        "import sys; sys.modules['torch'] = None; from pybatch.cli import app\n"
        "for ending in sys.argv[2:]: app(['report', sys.argv[1], '-o', f'a.{ending}'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), *endings], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for ending in endings:
        assert "tuned" in (tmp_path / f"a.{ending}").read_text()


def test_bad_report_flags(store, tmp_path):
    for flags, cause in (
        (["-o", "a.png"], "--png FOLDER"),
        (["-o", "a.xls"], "no format known here"),
        (["--target", "trian=0.1"], "train"),
    ):
        done = runner.invoke(cli.app, ["report", str(store), *flags])
        assert isinstance(done.exception, UsageError)
        assert cause in str(done.exception)


def test_a_record_has_no_losses_to_read_another_target_from(store, tmp_path):
    record = tmp_path / "run.json"
    record.write_text(read_store(store)[0].to_json())
    arguments = ["report", str(record), "-o", str(tmp_path / "a.md"), "--target"]
    done = runner.invoke(cli.app, [*arguments, "train=0.5"])
    assert isinstance(done.exception, UsageError)
    assert "run.json' has the steps to train=0.1,test=0.2 and no losses" in str(done.exception)
    assert "Give the store" in str(done.exception)
    assert runner.invoke(cli.app, [*arguments, "train=0.1,test=0.2"]).exit_code == 0


@pytest.mark.parametrize("seed", range(5))
def test_crossings_found_at_once_are_those_found_one_by_one(seed):
    rng = np.random.default_rng(seed)
    steps = [0]
    while steps[-1] < 3000:
        steps.append(next_evaluation(steps[-1]))
    steps = np.array(steps, dtype=np.int32)
    losses = (np.exp(-steps / 800) + 0.2 * rng.standard_normal(len(steps))).astype(np.float32)
    if seed > 2:
        losses[rng.integers(5, len(losses), 3)] = [np.nan, np.inf, np.nan]
    found = Trajectory(steps, losses, losses)
    for target in (*np.quantile(losses[np.isfinite(losses)], [0.05, 0.3, 0.6]), float(losses[0]), -9.0):
        each = (crossing_at(steps, losses, i, target) for i in range(len(steps)))
        assert found.crossing("train", target) == next((c for c in each if c is not None), None)


def test_a_finished_sweep_is_not_said_to_be_unfinished(tmp_path):
    path = tmp_path / "runs.db"
    live = pybatch.measure_convergence(
        find("quadratic"), [4, 16], device="cpu", seeds=1, rates=[0.5, 1.0], target={"train": 0.5}, store=path
    )
    [run] = read_store(path)
    assert run.complete
    assert run.convergence.notes == live.notes == ()


def test_a_sweep_with_other_options_and_more_seeds_changes_nothing(copy, monkeypatch):
    [before] = read_store(copy)
    monkeypatch.setattr(planted, "GROUP", planted.GROUP | {"momentum": 0.0})
    planted.plant(copy, BATCHES, seeds=5, rules=("tuned",))
    runs = {run.convergence.seeds: run for run in read_store(copy)}
    assert set(runs) == {3, 5}
    assert runs[3].convergence == before.convergence
    assert runs[5].convergence.trials == 5 * len(BATCHES) * len(planted.RATES)


def test_batches_that_more_seeds_have_not_run_keep_their_median(copy):
    [before] = read_store(copy)
    planted.plant(copy, BATCHES[:2], seeds=5, rules=("tuned",))
    [run] = read_store(copy)
    assert not run.complete
    tuned, own = run.convergence.curves[0], before.convergence.curves[0]
    assert [(p.batch, p.seeds, p.reached) for p in tuned.points] == [(8, 5, 5), (32, 5, 5), (128, 3, 3), (512, 3, 3)]
    assert [p.steps for p in tuned.points[2:]] == [p.steps for p in own.points[2:]]
    assert tuned.low <= planted.CRITICAL <= tuned.high
    assert any("are missing" in note.text for note in run.convergence.notes)
    assert not any("diverged are" in note.text for note in tuned.notes)


def test_a_batch_whose_first_seed_alone_has_run_is_reached_by_it(copy):
    """As a race that was cut leaves it."""
    for key, spec in sqlite3.connect(copy).execute("SELECT key, spec FROM trial").fetchall():
        if (trial := json.loads(spec))["seed"] > 0 and trial["batch"] == 512:
            change(copy, "DELETE FROM trial WHERE key = ?", key)
    [run] = read_store(copy)
    found = run.convergence.curves[0].points[-1]
    assert (found.batch, found.status, found.reached, found.seeds) == (512, "reached", 1, 1)
    assert found.rates[0].statuses[1:] == ("not_run", "not_run")
    assert not run.complete


@pytest.fixture
def quick(monkeypatch):
    """Planted losses: what these sweeps train is of no account, only what the store says of them."""
    with planted_training(monkeypatch):
        yield


def sweep_of_quadratic(path, batches=(4, 16, 64), **changes):
    given = {"device": "cpu", "seeds": 2, "rates": [0.02, 0.04, 0.08], "search": "grid", "target": {"train": 0.3}}
    return pybatch.measure_convergence(find("quadratic"), list(batches), store=path, resume=True, **(given | changes))


def cut(monkeypatch, path, batches_done, **changes):
    """A sweep that is interrupted once every seed of a batch size has run the first grid, before the rates beside."""
    own, calls = Grid.halfway, []

    def halfway(self, race):
        if id(self) not in calls:
            calls.append(id(self))
        if len(calls) > batches_done:
            raise KeyboardInterrupt
        return own(self, race)

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "halfway", halfway)
        with pytest.raises(Interrupted):
            sweep_of_quadratic(path, **changes)


def test_a_search_cut_after_every_seed_has_run_is_not_complete(tmp_path, monkeypatch, quick):
    path = tmp_path / "runs.db"
    cut(monkeypatch, path, 1)  # the base batch is over, the largest is not, the middle one has not begun
    [run] = read_store(path)
    [curve] = run.convergence.curves
    assert [(p.batch, p.reached) for p in curve.points] == [(4, 2)]  # half a search compares with nothing
    assert not run.complete
    [note] = [note.text for note in run.convergence.notes if "missing" in note.text]
    assert "batch 16 tuned" in note
    assert "batch 64 tuned" in note
    assert "batch 4 tuned" not in note
    live = sweep_of_quadratic(path)
    [run] = read_store(path)
    assert run.complete
    assert [p.steps for p in run.convergence.curves[0].points] == [p.steps for p in live.curves[0].points]


def test_a_search_of_more_rates_is_an_experiment_of_its_own(tmp_path, monkeypatch, quick):
    """A finished sweep of few rates does not make the larger one complete that was cut, nor lends it its curve."""
    path = tmp_path / "runs.db"
    few = sweep_of_quadratic(path, rates=[0.02, 0.04])
    assert read_store(path)[0].complete
    cut(monkeypatch, path, 1)
    assert sorted(run.complete for run in read_store(path)) == [False, True]
    many = sweep_of_quadratic(path)
    read = {run.convergence.experiment: run.convergence for run in read_store(path)}
    assert read.pop(many.experiment) == many
    [again] = read.values()
    for a, b in zip(few.curves[0].points, again.curves[0].points, strict=True):  # what ran on counts in full
        assert (a.steps, a.learning_rate, len(a.rates)) == (b.steps, b.learning_rate, len(b.rates))


def test_what_a_sweep_added_to_is_still_over(tmp_path, quick):
    path = tmp_path / "runs.db"
    sweep_of_quadratic(path, (4, 16))
    sweep_of_quadratic(path, (4, 64))
    [run] = read_store(path)
    assert run.complete
    assert [p.batch for p in run.convergence.curves[0].points] == [4, 16, 64]


def test_repeats_with_other_seeds_are_pooled(tmp_path, quick):
    """Each batch size at the rate of the least median over all seeds that ran it; the records of both are in it."""
    path = tmp_path / "runs.db"
    options = {"rates": [0.01, 0.02, 0.04, 0.08]}
    lives = [sweep_of_quadratic(path, seed=seed, **options) for seed in (0, 7)]
    [run] = read_store(path)
    pooled = run.convergence
    assert (run.complete, pooled.seeds, pooled.trials) == (True, 4, sum(live.trials for live in lives))
    assert "seeds 0 to 1 and 7 to 8 of 2 sweeps are pooled" in [note.text for note in pooled.notes]
    for own, *parts in zip(pooled.curves[0].points, *(live.curves[0].points for live in lives), strict=True):
        table = {}
        for k, part in enumerate(parts):
            for rate in part.rates:
                lost = [math.nan if status == "not_run" else math.inf for status in rate.statuses]
                steps = [lost[i] if step is None else step for i, step in enumerate(rate.steps)]
                table.setdefault(rate.learning_rate, [math.nan] * 4)[2 * k : 2 * k + 2] = steps
        assert {r.learning_rate for r in own.rates} == set(table)
        assert own.steps == min(np.nanmedian(steps) for steps in table.values())
        assert own.reached == np.isfinite(table[own.learning_rate]).sum()
    stored = {json.loads(spec)["seed"] for (spec,) in sqlite3.connect(path).execute("SELECT spec FROM trial")}
    assert stored == {0, 1, 7, 8}
    members = [replace(run, convergence=live) for live in lives]
    assert set(pooled.pooled) == {live.experiment for live in lives}
    assert join([*members, run]) == [run]  # saved records of what is pooled count once
    newer = replace(run, convergence=replace(lives[0], changed="9999"))
    assert join([newer, run]) == [newer, run]


def test_repeats_whose_rules_start_from_other_rates_stay_apart(tmp_path, quick):
    path = tmp_path / "runs.db"
    options = {"rules": ["linear"], "rates": [0.039, 0.04, 0.041]}  # noise decides between these
    rates = [sweep_of_quadratic(path, seed=seed, **options).curves[0].points[0].learning_rate for seed in (0, 7, 14)]
    assert len(set(rates)) > 1
    runs = read_store(path)
    assert [run.convergence.seeds for run in runs] == [2, 2, 2]
    [text] = {note.text for run in runs for note in run.convergence.notes}
    assert text == (
        "sweeps with seeds 0 to 1 and 7 to 8 and 14 to 15 are not pooled: rules start from rate "
        f"{' and '.join(f'{numerals.number(rate)}' for rate in rates)} in them"
    )


def test_repeats_that_share_seeds_stay_apart(tmp_path, quick):
    path = tmp_path / "runs.db"
    sweep_of_quadratic(path, (4, 16))
    sweep_of_quadratic(path, (4, 16), seed=1)
    runs = read_store(path)
    assert [run.convergence.seeds for run in runs] == [2, 2]
    text = "sweeps with seeds 0 to 1 and 1 to 2 are not pooled, as they share some"
    assert all(text in [note.text for note in run.convergence.notes] for run in runs)
