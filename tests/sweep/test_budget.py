"""Test losses at equal epochs and equal steps: against runs made by hand, what the store says, and bad budgets."""

import math
import sqlite3

import numpy as np
import pytest
import torch
from cases.planted_training import planted_training
from cases.points import claims, curve
from cases.sweeps import Isotropic, measure

from pybatch.answer.claims import check_claims, notes_on_claims
from pybatch.base.errors import Interrupted, UsageError
from pybatch.records import Convergence, ConvergencePoint, Run
from pybatch.report.claims import plots
from pybatch.scaling import Scaled
from pybatch.sweep import driver
from pybatch.sweep.archive import read_store
from pybatch.sweep.budget import Budget, with_losses
from pybatch.sweep.contents import LONGER
from pybatch.training.fingerprint import fingerprint
from pybatch.training.loop import Loop
from pybatch.training.trajectory import Trajectory, next_evaluation
from pybatch.training.trial import Outcome, Trial

EPOCHS = 8.0  # of 100 examples: 200, 50 and 13 steps of batch 4, 16 and 64
BATCHES = (4, 16, 64)
CPU = torch.device("cpu")


class Endless(Isotropic):
    examples = None


@pytest.fixture
def quick(monkeypatch):
    """Planted losses, where only what is asked of runs and said of them matters."""
    with planted_training(monkeypatch):
        yield


def gap(workload=None, batches=BATCHES, **changes):
    return measure(workload, batches, **({"gap_epochs": EPOCHS, "target": {"train": 0.4}} | changes))


def by_hand(batch, lr, seed, steps):
    """The mean test loss over the last fifth of the steps, of a run without a stack, a race or a store."""
    group = {"lr": lr, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
    trial = Trial(fingerprint(Isotropic()), "sgd", Scaled(group), batch, seed, "fp32", "cpu")
    run, step, losses = Loop(Isotropic(), [trial], CPU), 0, {}
    while step < steps:
        then = min(next_evaluation(step), steps)
        run.advance(then - step)
        step = then
        losses[step] = run.evaluate()[1][0]
    return np.mean([loss for at, loss in losses.items() if at > 0.8 * steps])


def test_every_batch_size_has_its_epochs_and_all_the_same_steps():
    found = gap()
    assert (found.gap_epochs, found.gap_steps, found.complete) == (EPOCHS, 13, True)
    for p in found.curves[0].points:
        steps = {4: 200, 16: 50, 64: 13}[p.batch]
        epochs = [by_hand(p.batch, p.learning_rate, seed, steps) for seed in range(3)]
        assert p.test_losses_at_epochs == pytest.approx(epochs, rel=1e-3)
        same = [by_hand(p.batch, p.learning_rate, seed, 13) for seed in range(3)]
        # Between two evaluations a loss is interpolated; a run that ends at the step has one there.
        assert p.test_losses_at_steps == pytest.approx(same, rel=1e-3)
    small, _, large = found.curves[0].points
    assert max(small.test_losses_at_epochs) < min(large.test_losses_at_epochs)
    assert large.test_losses_at_epochs == large.test_losses_at_steps


def test_steps_to_the_target_stay_what_they_were(quick):
    plain, longer = measure(batches=BATCHES, target={"train": 0.4}), gap()
    assert plain.gap_epochs is None
    assert plain.trials == longer.trials
    for a, b in zip(plain.curves[0].points, longer.curves[0].points, strict=True):
        assert (a.steps, a.learning_rate, a.status) == (b.steps, b.learning_rate, b.status)
        assert a.test_losses_at_epochs == a.test_losses_at_steps == ()


def test_a_rule_that_misses_the_target_is_compared_and_one_that_diverges_is_not():
    missed = {"rules": ["constant"], "base_batch": 64, "target": {"train": 1e-4}, "max_steps": 12, "gap_epochs": 1.9}
    small = gap(batches=(16, 64), **missed).curves[0].points[0]
    assert (small.batch, small.status) == (16, "not_reached")
    assert all(small.test_losses_at_epochs)
    found = gap(rules=["linear"], rates=[0.2, 0.3, 0.4], target={"train": 0.01}, gap_epochs=12)
    large = found.curves[0].points[2]
    assert (large.batch, large.status) == (64, "diverged")
    assert large.test_losses_at_epochs == (None, None, None)


def test_a_rate_that_was_not_found_has_no_runs_to_go_on(quick):
    for rates in ([0.01], [0.01, 0.02]):  # of one as of two, since the search goes on from there
        found = gap(rates=rates, target={"train": 1e-30}, max_steps=200, gap_epochs=8)
        for p in found.curves[0].points:
            assert (p.status, p.learning_rate, p.test_losses_at_epochs) == ("not_reached", None, ())


def test_losses_are_compared_at_the_rates_of_the_first_target_only(quick):
    found = gap(target={"train": 0.4, "test": 0.4})
    train, test = found.curves
    assert all(p.test_losses_at_epochs for p in train.points)
    assert not any(p.test_losses_at_epochs for p in test.points)


def test_a_store_gives_the_same_record_and_runs_nothing_twice(tmp_path, quick):
    path = tmp_path / "runs.db"
    arguments = {"rules": ["tuned", "sqrt"], "store": path}
    live = gap(**arguments)
    [run] = read_store(path)
    read = run.convergence
    assert (read.complete, read.gap_epochs, read.gap_steps) == (True, EPOCHS, 13)
    for a, b in zip(live.curves, read.curves, strict=True):
        for p, q in zip(a.points, b.points, strict=True):
            assert (p.steps, p.status) == (q.steps, q.status)
            assert p.test_losses_at_epochs == pytest.approx(q.test_losses_at_epochs, rel=1e-6)
            assert p.test_losses_at_steps == pytest.approx(q.test_losses_at_steps, rel=1e-6)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE trial SET created = '2020-01-01T00:00:00+00:00'")
    gap(**arguments, resume=True)
    assert db.execute("SELECT count(*) FROM trial WHERE created <> '2020-01-01T00:00:00+00:00'").fetchone() == (0,)
    gap(**arguments, resume=True, gap_epochs=16)
    assert db.execute("SELECT count(*) FROM trial WHERE created <> '2020-01-01T00:00:00+00:00'").fetchone()[0] >= 9
    assert read_store(path)[0].convergence.gap_epochs == 16
    db.close()


def test_a_sweep_resumed_with_a_larger_batch_asks_no_more_of_the_others(tmp_path, quick):
    path = tmp_path / "runs.db"
    gap(store=path)
    measure(batches=(128,), base_batch=4, target={"train": 0.4}, store=path, resume=True)
    [run] = read_store(path)
    steps = run.convergence
    assert steps.complete
    assert steps.gap_steps == 7  # of batch 128
    last = steps.curves[0].points[-1]
    assert (last.batch, last.test_losses_at_epochs) == (128, (None,) * 3) or all(last.test_losses_at_epochs)


def test_a_target_met_past_the_cap_counts_in_the_sweep_as_in_its_store(tmp_path, monkeypatch):
    """A rule's runs are given up at a cap; where a budget takes them further, both records take what they show."""
    monkeypatch.setattr(driver.Sweep, "_cap", lambda self, base, batch, split=None: 3)
    path = tmp_path / "runs.db"
    live = gap(rules=["constant"], store=path).curves[0]
    read = read_store(path)[0].convergence.curves[0]
    for a, b in zip(live.points, read.points, strict=True):
        assert (a.batch, a.steps, a.reached, a.rates) == (b.batch, b.steps, b.reached, b.rates)
    assert all(p.steps > 3 and p.reached == 3 for p in live.points)


def test_a_longer_run_counts_in_every_curve_that_it_stands_in(tmp_path, monkeypatch):
    """At batch 4 both targets' rules train the same trials; those of the first go on to the budget."""
    monkeypatch.setattr(driver.Sweep, "_cap", lambda self, base, batch, split=None: 3)
    arguments = {"rules": ["constant"], "base_rate": 0.1, "target": {"train": 0.4, "test": 0.4}}
    arguments["store"] = tmp_path / "runs.db"
    records = [gap(**arguments), gap(**arguments, resume=True), gap(**arguments, resume=True, gap_epochs=None)]
    read = read_store(arguments["store"])[0].convergence
    for found in records:
        for a, b in zip(found.curves, read.curves, strict=True):
            for p, q in zip(a.points, b.points, strict=True):
                assert (p.steps, p.reached, p.rates) == (q.steps, q.reached, q.rates)
            assert all(p.reached == 3 and p.steps > 3 for p in a.points)


def test_a_resumed_sweep_with_fewer_steps_counts_what_is_stored(tmp_path):
    """It said "reached" of runs of which it counted none."""
    arguments = {"rules": ["constant"], "base_rate": 0.02, "target": {"train": 0.4}, "store": tmp_path / "runs.db"}
    whole = measure(batches=BATCHES, **arguments).curves[0].points
    again = measure(batches=BATCHES, **arguments, max_steps=30, resume=True).curves[0].points
    assert min(p.steps for p in whole) > 30
    assert [(p.steps, p.reached, p.rates) for p in again] == [(p.steps, p.reached, p.rates) for p in whole]


def test_a_base_batch_beside_the_others_spends_no_budget(tmp_path):
    """16 epochs of batch 1 would be 1600 steps, past `max_steps`, and of use to no curve."""
    path = tmp_path / "runs.db"
    found = gap(batches=(16, 64), base_batch=1, rules=["tuned", "sqrt"], gap_epochs=16, store=path)
    assert found.complete
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT steps, train, test FROM trial WHERE json_extract(spec, '$.batch') = 1").fetchall()
    db.close()
    assert rows
    assert max(Trajectory.decompressed(*row).steps[-1] for row in rows) <= 400


def test_runs_that_could_not_go_on_are_named_with_the_reason(monkeypatch, quick):
    begin = driver.Sweep._finish

    def lose(self, cells):
        for cell in cells:
            if cell.name[1] == LONGER and cell.batch == 16:
                self._fail(cell, "its worker was lost")
        begin(self, cells)

    monkeypatch.setattr(driver.Sweep, "_finish", lose)
    found = gap()
    assert not found.complete
    assert "batch 16 tuned to 8 epochs: its worker was lost" in [note.text for note in found.notes]


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1.1, 10, 11), (2.2, 10, 22), (1.15, 10, 12), (8.0, 64, 13)])
def test_a_budget_has_no_step_from_rounding(epochs, batch, steps):
    assert Budget.of(epochs, 100, [batch]).steps == steps


def test_what_a_cut_leaves_out_is_named(tmp_path, monkeypatch):
    path, going = tmp_path / "runs.db", []
    end = driver.Sweep._end

    def cut(self, cell, outcomes):
        if cell.name[1] == LONGER:
            if going:
                raise KeyboardInterrupt
            going.append(cell.batch)
        end(self, cell, outcomes)

    monkeypatch.setattr(driver.Sweep, "_end", cut)
    with pytest.raises(Interrupted) as caught:
        gap(store=path)
    monkeypatch.undo()
    found = caught.value.partial
    assert not found.complete
    done = {p.batch: p.test_losses_at_epochs for p in found.curves[0].points}
    assert all(done.pop(going[0]))
    [left] = [batch for batch, losses in done.items() if losses == (None,) * 3]  # the second one's runs were stored
    assert [n.text for n in found.notes] == [f"trials are missing of batch {left} tuned to 8 epochs"]
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM trial WHERE json_extract(spec, '$.batch') = 64 AND json_extract(spec, '$.seed') = 2")
    db.close()
    [run] = read_store(path)
    assert not run.complete
    assert any("batch 64 tuned" in note.text for note in run.convergence.notes)
    whole = gap(store=path, resume=True)
    assert whole.complete
    assert all(all(p.test_losses_at_epochs) for p in whole.curves[0].points)


def test_other_targets_asked_of_a_store_leave_no_gap_open(tmp_path, quick):
    path = tmp_path / "runs.db"
    gap(store=path)
    [run] = read_store(path, {"train": 0.9})
    assert run.complete


def losses(run):
    return {p.batch: p.test_losses_at_epochs for p in run.convergence.curves[0].points}


def test_of_two_budgets_the_one_of_more_batch_sizes_is_shown_and_the_other_named(tmp_path, quick):
    """The larger one alone was shown, though it compares two batch sizes only; longer runs have its losses too."""
    path = tmp_path / "runs.db"
    first = gap(store=path)
    gap(batches=(4, 16), store=path, resume=True, gap_epochs=16.0)
    [run] = read_store(path)
    assert (run.convergence.gap_epochs, run.complete) == (EPOCHS, True)
    for p in first.curves[0].points:  # the longer runs have no evaluation right at the end of the shorter budget
        assert losses(run)[p.batch] == pytest.approx(p.test_losses_at_epochs, rel=0.05)
    assert all(map(all, losses(run).values()))
    [note] = [note.text for note in run.convergence.notes]
    assert note.startswith("test losses after 16 epochs, asked for at batch 4, 16, are not shown: those after 8")
    gap(store=path, resume=True, gap_epochs=16.0)
    [run] = read_store(path)
    assert (run.convergence.gap_epochs, run.complete) == (16.0, True)
    assert all(map(all, losses(run).values()))


def test_a_budget_that_was_spent_at_a_rate_that_more_seeds_outdo_is_not_missing(tmp_path, quick):
    path, rates = tmp_path / "runs.db", [0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22, 0.32]
    before = gap(store=path, seeds=1, rates=rates).curves[0].points
    after = measure(batches=BATCHES, store=path, seeds=3, rates=rates, target={"train": 0.4}, resume=True)
    pairs = zip(before, after.curves[0].points, strict=True)
    assert {a.batch for a, b in pairs if a.learning_rate != b.learning_rate} & {4, 16}
    assert after.complete
    said = [note.text for note in after.notes if "missing of runs that were chosen later" in note.text]
    assert [text.partition(":")[0] for text in said] == ["batch 4 tuned", "batch 16 tuned"]  # 64 had run so far
    again = gap(store=path, seeds=3, rates=rates, resume=True)
    assert again.complete
    assert not again.notes
    assert all(all(p.test_losses_at_epochs) for p in again.curves[0].points)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gap_epochs": 0.0}, "gap epochs 0: give epochs above 0"),
        ({"gap_epochs": math.inf}, "gap epochs inf: give epochs above 0"),
        ({"gap_epochs": math.nan}, "gap epochs nan: give epochs above 0"),
        ({"gap_epochs": 0.5}, "50 examples, less than one step of batch 64"),
        ({"gap_epochs": 17.0}, "425 steps of batch 4, above max_steps 400. Allow 425 steps"),
        ({"workload": Endless()}, "names no number of training examples"),
    ],
)
def test_budgets_that_cannot_be_spent_are_refused_before_anything_runs(tmp_path, changes, said):
    path = tmp_path / "runs.db"
    with pytest.raises(UsageError, match=said):
        gap(store=path, **changes)
    assert not path.exists()


def test_losses_are_read_by_seed_at_the_chosen_rate():
    steps = np.arange(0, 101, 10, dtype=np.int32)

    def outcome(seed, lr, height, end="capped", upto=101):
        kept = steps[steps < upto]
        flat = np.full(len(kept), height, dtype=np.float32)
        return Outcome(
            Trial("w", "sgd", Scaled({"lr": lr}), 8, seed, "fp32", "cpu"), end, Trajectory(kept, -flat, flat), 0.0
        )

    outcomes = [outcome(0, 0.1, 9.0), outcome(0, 0.5, 1.0), outcome(2, 0.5, 3.0, "diverged", 60)]
    budget = Budget.of(1.0, 800, [8, 16])
    assert (budget.steps_at(8), budget.steps) == (100, 50)
    assert [budget.spent(o) for o in outcomes] == [True, True, True]
    assert not budget.spent(outcome(1, 0.5, 2.0, "met", 91))
    found = with_losses(ConvergencePoint(8, 70.0, "reached", 3, 0.5), outcomes, (0, 1, 2), budget)
    assert found.test_losses_at_epochs == (1.0, None, None)
    assert found.test_losses_at_steps == (1.0, None, 3.0)
    assert found.train_losses_at_epochs == (-1.0, None, None)
    assert found.train_losses_at_steps == (-1.0, None, -3.0)


def planted(epochs, steps, train=0.5, later=0.0):
    """Curves whose points have these test losses, seed by seed, at batches 8, 64, ...

    Args:
        epochs, steps: test losses after the epochs and after the steps.
        train: the train loss of all; None: the record is of old and has none.
        later: what each batch size adds to both losses, as of runs that are trained less far.
    """

    def lift(losses, by):
        return tuple(loss + by if loss is not None else None for loss in losses)

    points = []
    for k, (e, s) in enumerate(zip(epochs, steps, strict=True), 1):
        more = {"test_losses_at_epochs": lift(e, later * k), "test_losses_at_steps": lift(s, later * k)}
        if train is not None:
            more["train_losses_at_epochs"] = more["train_losses_at_steps"] = (train + later * k,) * 3
        points.append(ConvergencePoint(8**k, None, "not_reached", 3, 0.5, **more))
    run = Run("", None, convergence=Convergence((curve("sqrt", points),), gap_epochs=30.0, gap_steps=44))
    return {claim.name: claim for claim in check_claims(run)}


LOW, HIGH, NONE = (1.0, 1.1, 0.9), (1.21, 1.3, 1.1), (None, None, None)


def test_claims_speak_of_both_budgets():
    found = planted([LOW, NONE, HIGH], [HIGH, LOW, LOW])
    epochs, steps = found["sqrt: gap, 30 epochs"], found["sqrt: gap, 44 steps"]
    assert (epochs.finding, steps.finding) == ("yes", "no")
    # +0.203 [0.189 to 0.218] over six doublings
    assert epochs.text.startswith("after 30 epochs, each doubling from 8 to 512 adds +0.0339 [0.0315 to 0.0363] to the")
    assert "test 1, train 0.500 with 8; test 1.20, train 0.500 with 512" in epochs.text
    assert steps.text.startswith("after 44 steps, each doubling from 8 to 512 adds -0.0339")
    assert not any("train loss 0.1" in claim.text for claim in found.values() if "epochs" in claim.name)


def test_runs_that_are_merely_untrained_do_not_generalize_worse():
    """Test losses rise with the batch, and so do the train losses: the gap is the same, or smaller."""
    same = planted([LOW, LOW, LOW], [LOW, LOW, LOW], later=0.5)["sqrt: gap, 30 epochs"]
    assert same.finding == "undetermined"
    less = planted([HIGH, LOW, LOW], [LOW, LOW, LOW], later=0.5)["sqrt: gap, 30 epochs"]
    assert less.finding == "undetermined"  # nor better, for a gap opens as a run is trained
    assert less.text.endswith("trained less with larger batches")
    further = planted([LOW, HIGH, HIGH], [LOW, LOW, LOW], later=-0.5)["sqrt: gap, 30 epochs"]
    assert further.finding == "undetermined"
    assert further.text.endswith("trained further with larger batches")


def test_without_train_losses_no_test_loss_is_judged():
    found = planted([LOW, NONE, HIGH], [HIGH, LOW, LOW], train=None)["sqrt: gap, 30 epochs"]
    assert found.finding == "not measured"
    assert "no train losses after 30 epochs" in found.text


def test_claims_name_the_seeds_that_are_missing_and_what_diverged():
    found = planted([LOW, (1.2, None, 1.3), NONE], [LOW, NONE, NONE])
    assert found["sqrt: gap, 30 epochs"].text.endswith("; 2 of 3 seeds")
    assert found["sqrt: gap, 44 steps"].finding == "not measured"
    fewer = planted([HIGH, (1.0, None, 0.9), NONE], [LOW, NONE, NONE])["sqrt: gap, 30 epochs"]
    assert fewer.finding == "undetermined"  # the lost seed may have been the worst


def test_without_a_budget_the_report_says_how_to_get_one():
    without, spent = Convergence((curve("tuned", ()),)), Convergence((curve("tuned", ()),), gap_epochs=1.0)
    assert any("--gap-epochs" in note for note in notes_on_claims(without))
    assert not any("--gap-epochs" in note for note in notes_on_claims(spent))
    assert not any("epochs" in name for name in claims(curve("tuned", ())))


def test_figures_show_each_budget_that_two_batch_sizes_have():
    points = [
        ConvergencePoint(
            8 * 4**k, 9.0, "reached", 3, 0.5, other_losses=(1.0,), test_losses_at_epochs=at, test_losses_at_steps=once
        )
        for k, (at, once) in enumerate([((3.0, 1.0, 2.0), NONE), ((6.0, 4.0, None), NONE), (NONE, (2.0, 3.0, 4.0))])
    ]
    steps = Convergence((curve("sqrt", points),), gap_epochs=30.0, gap_steps=44)
    target, epochs = plots(steps, "images")
    assert (target.title, epochs.title) == ("Test loss where train loss 0.100 was met", "Test loss after 30 epochs")
    [trace] = epochs.traces
    assert (trace["x"], trace["y"]) == ([8, 32], [2.0, 5.0])
    assert trace["error_y"]["array"] == [1.0, 1.0]
    assert epochs.table.rows == (
        ("sqrt", "8", "2", "1", "3", "3 of 3"),
        ("sqrt", "32", "5", "4", "6", "2 of 3"),
    )
    assert plots(Convergence((curve("tuned", ()),))) == []
