"""Rules that start from a rate the user gives: nothing is sought for them, and stores keep such sweeps apart."""

import json
import math
import sqlite3

import pytest
from cases.planted_training import planted_training
from cases.sweeps import measure

from pybatch.base.errors import UsageError
from pybatch.device.environment import capture
from pybatch.records import Run
from pybatch.report.formats.text import render
from pybatch.sweep.archive import read_store
from pybatch.sweep.store import Store
from pybatch.training.trial import rounded

FIXED = ["constant", "sqrt", "linear"]
FACTORS = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}


@pytest.fixture
def quick(monkeypatch):
    """Planted losses, where only what is asked of runs and said of them matters."""
    with planted_training(monkeypatch):
        yield


def specs(path):
    with sqlite3.connect(path) as db:
        found = [json.loads(spec) for (spec,) in db.execute("SELECT spec FROM trial")]
    db.close()
    return found


def test_rules_start_from_it_and_no_rate_is_sought(tmp_path):
    path = tmp_path / "runs.db"
    found = measure(rules=FIXED, base_rate=0.13, store=path)
    assert (found.base_batch, found.base_rate, found.complete) == (4, 0.13, True)
    for curve in found.curves:
        for p in curve.points:
            assert p.learning_rate == rounded(0.13 * (p.batch / 4) ** FACTORS[curve.rule])
            assert p.status == "reached"
    rates = {(s["batch"], s["scaled"]["group"]["lr"]) for s in specs(path)}
    assert len(rates) == 1 + 3 * 3
    # A quarter of the base steps warm up a linear rate; that they were known shows that the base batch was run.
    base = found.curves[0].points[0].steps
    warm = {s["batch"]: s["scaled"]["warmup_steps"] for s in specs(path) if s["scaled"]["warmup_steps"]}
    assert set(warm) == {8, 16, 32}
    assert warm[8] == pytest.approx(2 * warm[16], abs=1)
    assert warm[8] < base


def test_tuned_curves_are_what_they_are_without_it():
    alone, beside = measure(), measure(rules=["tuned", "sqrt"], base_rate=0.05)
    tuned, sqrt = beside.curves
    assert [(p.steps, p.learning_rate) for p in tuned.points] == [
        (p.steps, p.learning_rate) for p in alone.curves[0].points
    ]
    assert [p.learning_rate for p in sqrt.points] == [rounded(0.05 * (p.batch / 4) ** 0.5) for p in sqrt.points]
    assert sqrt.points[0].steps > tuned.points[0].steps


def test_a_rate_that_does_not_reach_the_target_is_still_where_rules_start():
    found = measure(rules=["linear"], base_rate=0.002, max_steps=300)
    statuses = [p.status for p in found.curves[0].points]
    assert statuses[0] == "not_reached"
    assert found.curves[0].points[3].learning_rate == pytest.approx(0.016)


def test_a_store_keeps_sweeps_of_other_base_rates_apart(tmp_path, quick):
    path = tmp_path / "runs.db"
    live = [measure(rules=FIXED, base_rate=rate, store=path, resume=rate != 0.1) for rate in (0.1, 0.2)]
    read = [run.convergence for run in read_store(path)]
    assert [r.base_rate for r in read] == [0.1, 0.2]
    for a, b in zip(live, read, strict=True):
        assert b.complete
        assert a.trials == b.trials
        for x, y in zip(a.curves, b.curves, strict=True):
            assert [(p.batch, p.steps, p.learning_rate, p.status) for p in x.points] == [
                (p.batch, p.steps, p.learning_rate, p.status) for p in y.points
            ]


def test_the_report_says_where_rules_start(quick):
    given = Run("", None, convergence=measure(rules=["sqrt"], base_rate=0.13))
    assert "with rate 0.130 at batch 4, as given" in " ".join(render(given, "md").split())
    tuned = Run("", None, convergence=measure(rules=["sqrt"]))
    assert "as given" not in render(tuned, "md")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_rate": 0.0, "rules": ["sqrt"]}, "base rate 0: give a finite learning rate above 0"),
        ({"base_rate": math.nan, "rules": ["sqrt"]}, "base rate nan: give a finite"),
        ({"base_rate": math.inf, "rules": ["sqrt"]}, "base rate inf: give a finite"),
        ({"base_rate": 0.1}, "rule 'tuned' seeks its own rates. Add a rule"),
    ],
)
def test_rates_that_cannot_work_are_refused_before_anything_runs(tmp_path, changes, said):
    path = tmp_path / "runs.db"
    with pytest.raises(UsageError, match=said):
        measure(store=path, **changes)
    assert not path.exists()


def test_a_rule_is_given_up_at_four_times_the_tuned_steps(tmp_path):
    """Past twice them it has failed; without tuned ones it is the base batch's steps that end it."""
    path, alone = tmp_path / "runs.db", tmp_path / "alone.db"
    constant, tuned = measure(rules=["constant", "tuned"], base_rate=0.01, store=path).curves
    [bare] = measure(rules=["constant"], base_rate=0.01, store=alone).curves
    assert all(p.steps is not None for p in bare.points)
    best = {p.batch: p.steps for p in tuned.points}
    for p, free in zip(constant.points, bare.points, strict=True):
        late = p.batch > 4 and free.steps > 4 * best[p.batch]
        assert p.steps == (None if late else free.steps)
    assert any(p.steps is None for p in constant.points)
    [said] = [note.text for note in constant.notes if note.figure == "critical_batch"]
    assert said.startswith("1 of 4 batch sizes reached the target")
    assert said.endswith("or of tuned rates, or at --max-steps. Ease the target")  # there is no cap to raise
    with Store(path, capture(seed=0)) as store:
        ran = [row.outcome for row in store.contents().rows.values()]
    assert all(o.steps <= 4 * best[o.trial.batch] + 1 for o in ran if o.trial.lr == 0.01 and o.trial.batch > 4)
