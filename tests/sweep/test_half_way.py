"""Sweeps that go wrong half-way, and stores that several have written: nothing is lost, nothing is made up."""

import contextlib

import numpy as np
import pytest
from cases.planted_training import PlantedReplicas
from cases.sweeps import Isotropic

from pybatch import scaling
from pybatch.base.errors import Interrupted, UsageError
from pybatch.processes import workers
from pybatch.records import Environment, NoiseScale
from pybatch.scaling import Scaled
from pybatch.sweep import options, search
from pybatch.sweep.archive import read_store
from pybatch.sweep.measurement import measure_sweep
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.search import Grid, default_rates
from pybatch.sweep.store import Store
from pybatch.training.trial import Trial, rounded

HERE = Environment("3.11", "Linux", "0", "2.13", None, None, None, 1, 0, "test")
ASKED = {
    "batches": [4, 8, 16, 32, 64],
    "seeds": 1,
    "target": {"train": 0.2},
    "rates": [0.0025, 0.005],
    "search": "grid",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """Losses are planted; fits are real."""
    monkeypatch.setattr("pybatch.training.task.choose", lambda w, trials, d, how: (PlantedReplicas(trials), None))


def swept(path, found=None, noise=None, **asked):
    whole = SweepOptions(**{**ASKED, **asked})
    return measure_sweep(
        Isotropic(), whole, device="cpu", store=path, resume=True, noise=noise, environment=HERE, found=found
    )


@contextlib.contextmanager
def after(count, act):
    """Within it `act` is called with the store once so many outcomes have been put."""
    put, done = Store.put, []

    def puts(self, outcome):
        put(self, outcome)
        done.append(outcome)
        if len(done) == count:
            act(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "put", puts)
        yield done


def stop(store):
    raise KeyboardInterrupt


def test_half_a_search_is_in_no_curve_and_in_no_fit(tmp_path):
    with after(10**6, stop) as done:
        whole = swept(None).convergence.curves[0]
    order = [outcome.trial.batch for outcome in done]
    half = order.index(8) + 2  # of batch 8 two rates have run, of those the search will ask for
    with after(half, stop), pytest.raises(Interrupted) as stopped:
        swept(tmp_path / "cut.db")
    live, [stored] = stopped.value.partial.convergence, read_store(tmp_path / "cut.db")
    assert stored.convergence == live
    [cut] = live.curves
    over = {p.batch: p for p in whole.points}
    assert [p.batch for p in cut.points] == [p.batch for p in whole.points if p.batch != 8]
    assert [p.steps for p in cut.points] == [over[p.batch].steps for p in cut.points]
    assert any("batch 8 tuned" in note.text for note in live.notes)
    assert not live.complete


def test_a_search_whose_memory_ran_out_has_its_reason_and_no_point(monkeypatch):
    run_task = workers.run_task

    def failing(workload, task, deliver, **more):
        if task.trials[0].batch == 64:
            raise MemoryError
        return run_task(workload, task, deliver, **more)

    monkeypatch.setattr(workers, "run_task", failing)
    found = swept(None).convergence
    assert [p.batch for p in found.curves[0].points] == [4, 8, 16, 32]
    assert any("memory ran out" in note.text and "64" in note.text for note in found.curves[0].notes)
    assert not found.complete


@pytest.mark.parametrize("rules", [["linear"], ["constant", "linear"]])
def test_runs_at_a_given_rate_that_fail_give_rules_no_steps_in_the_sweep_or_its_record(monkeypatch, rules):
    run_task, failed = workers.run_task, []

    def failing(workload, task, deliver, **more):
        def some(outcome):
            deliver(outcome)
            failed.append(outcome)
            if len(failed) == 2:
                raise MemoryError

        return run_task(workload, task, deliver if failed else some, **more)

    monkeypatch.setattr(workers, "run_task", failing)
    rows = []
    found = swept(
        None, rows.append, batches=[8, 16, 32], seeds=3, base_batch=4, base_rate=0.04, rules=rules, rates=None
    ).convergence
    said = {(row.split()[1], int(row.split()[0])) for row in rows if row.split()[0].isdigit() and "(3/3)" in row}
    kept = {(curve.rule, p.batch) for curve in found.curves for p in curve.points if p.reached == 3}
    assert said
    assert kept == said


def test_a_store_reads_without_the_sampler_and_without_the_rule_that_its_sweeps_used(tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    pytest.importorskip("optuna")

    @scaling.register("of-ones-own")
    def own(group, batch, base):
        return Scaled({**group, "lr": group["lr"]})

    swept(path, search="tpe", batches=[4, 8])
    swept(path, rules=["of-ones-own"], batches=[4, 8], base_rate=0.02, rates=None)

    def missing(sampler):
        raise UsageError("search 'tpe' needs Optuna, which is not installed.")

    monkeypatch.delitem(scaling._rules, "of-ones-own")
    for module in (search, options):
        monkeypatch.setattr(module, "load_optuna", missing)
    sought, ruled = sorted(read_store(path), key=lambda run: run.convergence.curves[0].rule, reverse=True)
    assert [p.batch for p in sought.convergence.curves[0].points] == [4, 8]
    assert sought.complete
    assert any("'of-ones-own' is not known" in note.text for note in ruled.convergence.curves[0].notes)
    assert not ruled.complete
    assert swept(path, batches=[4, 8]).complete  # another sweep goes on in the same store


def test_a_store_that_breaks_in_mid_sweep_loses_no_cell_that_was_over(tmp_path):
    def spoil(store):
        with open(store.path, "r+b") as file:
            file.truncate(4096)

    whole = {p.batch: p for p in swept(None).convergence.curves[0].points}
    with after(30, spoil):
        found = swept(tmp_path / "runs.db")
    assert not found.complete
    assert not found.convergence.complete
    points = found.convergence.curves[0].points
    assert points
    assert [p.steps for p in points] == [whole[p.batch].steps for p in points]
    assert any("cannot be" in note.text for note in found.convergence.notes)


def test_a_rule_added_with_fewer_seeds_is_whole_where_a_search_has_run_its_trials(tmp_path):
    path, asked = tmp_path / "runs.db", {"batches": [4, 16], "rates": [0.02, 0.04, 0.08]}
    swept(path, **asked, seeds=3)
    found = swept(path, **asked, seeds=1, rules=["sqrt"]).convergence  # 0.04 at 4, so 0.08 at 16
    assert {p.batch: p.seeds for curve in found.curves if curve.rule == "sqrt" for p in curve.points} == {4: 3, 16: 3}
    assert found.complete


def test_a_rule_added_with_fewer_seeds_says_with_how_many_to_go_on(tmp_path):
    path, asked = tmp_path / "runs.db", {"batches": [4, 16], "rates": [0.02, 0.04, 0.08]}
    swept(path, **asked, seeds=3)
    found = swept(path, **asked, seeds=1, rules=["linear"]).convergence  # 0.16 at 16, which no search asked for
    [missing] = [note.text for note in found.notes if "missing" in note.text]
    assert "batch 16 linear" in missing
    assert missing.endswith("Another sweep here has 3 seeds: go on with as many for these, too")
    assert not found.complete
    assert swept(path, **asked, seeds=3, rules=["linear"]).complete


def test_a_noise_scale_that_could_not_be_measured_is_said_in_both_records(tmp_path):
    def failing():
        raise UsageError("it cannot be measured here.")

    def unnumbered(run):
        return run.complete, run.convergence, run.noise

    path = tmp_path / "runs.db"
    live = swept(path, noise=failing, batches=[4])
    assert not live.complete
    assert [note.figure for note in live.convergence.notes if "cannot be measured" in note.text] == ["noise"]
    assert unnumbered(read_store(path)[0]) == unnumbered(live)
    scale = NoiseScale(16.0, 14.0, 18.0, 1.0, 16.0, "resolved", "test", 100)
    assert swept(path, noise=scale, batches=[4]).complete
    assert read_store(path)[0].noise == scale


def test_the_noise_scale_is_the_one_measured_last(tmp_path):
    path = tmp_path / "runs.db"
    first, second = (NoiseScale(b, b / 2, 2 * b, 1.0, b, "resolved", "test", 100) for b in (10.0, 99.0))
    swept(path, noise=first, batches=[4])
    swept(path, noise=second, batches=[4, 8])
    swept(path, batches=[4])
    assert read_store(path)[0].noise == second


def test_what_another_process_could_run_has_run(tmp_path):
    with Store(tmp_path / "runs.db", HERE) as store:
        with after(1, stop), pytest.raises(Interrupted):
            swept(store.path)
        number = store.contents().sweeps[0].number
        cell = ("tuned", "", 4)
        store.end(number, [cell], "memory ran out")
        store.end(number, [cell])
        [sweep] = store.contents().sweeps
        assert (set(sweep.ended), sweep.failed) == ({cell}, {})
        store.end(number, [cell], "memory ran out")
        [sweep] = store.contents().sweeps
        assert (set(sweep.ended), sweep.failed) == ({cell}, {})


def test_default_rates_are_powers_of_two_however_often_they_are_halved():
    exact = default_rates("sgd", {"momentum": 0.9})
    grid = Grid(SweepOptions(batches=[4], rates=exact).rates)
    grid._try(grid.rates)
    lowest = min(grid.rates)
    for _ in range(3):
        [lowest] = grid._try([grid.exact[lowest] / grid.ratio])
    assert lowest == rounded(min(exact) / 8)
    assert Trial("w", "sgd", Scaled({"lr": lowest}), 4, 0, "fp32", "cpu").lr == lowest


@pytest.mark.parametrize("batches", [[4, 8.5], ["4"]])
def test_batch_sizes_are_whole_numbers(batches):
    with pytest.raises(UsageError, match="Give a list of whole numbers"):
        SweepOptions(batches=batches)


def test_batch_sizes_of_numpy_are_stored(tmp_path):
    assert SweepOptions(batches=[4.0, 8]).to_dict()["batches"] == [4, 8]
    assert swept(tmp_path / "runs.db", batches=list(np.array([8, 4]))).complete
    assert SweepOptions(batches=list(np.array([8, 4]))).to_dict()["batches"] == [4, 8]
