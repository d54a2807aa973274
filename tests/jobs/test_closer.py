"""After the verdict the advised batch is timed, or what is beside it: by a measurement that is planted here."""

import dataclasses

import pytest
import torch
from cases.verdicts import BATCHES, SWEEP, capacity, noise, throughput

from pybatch.base.errors import Interrupted, UsageError, WorkloadError
from pybatch.device.identity import describe
from pybatch.jobs import bench, resume
from pybatch.jobs.options import BenchOptions
from pybatch.records import BatchPoint, Convergence, Run
from pybatch.workloads.quadratic import Quadratic
from pybatch.workloads.running.session import Session


@pytest.fixture
def asked(monkeypatch):
    """What was asked of `measure_capacity`, which answers with twice as many samples, each step 2 % slower."""
    calls = []

    def measured(workload, *, batches, earlier, **given):
        calls.append((batches, earlier, given))
        points = tuple(BatchPoint(b, "ok", 1.02e3 * throughput().step_s(b), samples=20, reason=None) for b in batches)
        return dataclasses.replace(earlier, batches=points, model=None)

    monkeypatch.setattr(bench, "measure_capacity", measured)
    return calls


def closer(known, **options):
    found = bench._Found.begun(Quadratic(), torch.device("cpu"), BenchOptions(), None)
    found.capacity, found.noise = known, noise(400)
    return bench._closer(Quadratic(), torch.device("cpu"), BenchOptions(**options), found, 3.0, None)


def test_the_advised_batch_is_timed(asked):
    before = capacity(batches=BATCHES[::2])
    after = closer(before)
    [(batches, earlier, given)] = asked
    [batch] = set(batches) - set(BATCHES[::2])
    assert len(batches) == 2  # and one that was timed before
    assert max(batches) / min(batches) <= 2
    assert earlier.batches == ()  # nothing is measured again
    assert (given["find_max_batch"], given["time_budget"]) == (False, 3.0)
    assert after.model == before.model
    assert [p.batch for p in after.batches] == sorted((*BATCHES[::2], batch))
    assert "timed after the verdict advised" in after.notes[-1].text
    assert bench.advise(after, noise(400)).why("best_batch").inputs["largest_measured"] == 4096


def test_what_is_beside_one_that_was_timed_is_timed_and_then_nothing(asked):
    """Of the sizes people use, four an octave: on a disturbed machine those within an octave again, too."""
    best = bench.advise(capacity(), noise(400)).best_batch
    known = capacity(batches=sorted({*BATCHES, best}))
    beside = closer(known)
    [(batches, _, _)] = asked
    assert batches[1] == best  # which was timed before
    assert 0.75 <= batches[0] / best < 1 < batches[2] / best <= 1.25
    asked.clear()
    assert bench.advise(beside, noise(400)).best_batch == best
    assert closer(beside) is beside
    assert closer(capacity(), batches=BATCHES) == capacity()  # the user chose
    assert asked == []
    disturbed = dataclasses.replace(beside, disturbed=("other processes kept 1.9 of 2 cores busy",))
    again = closer(disturbed)
    [(batches, _, _)] = asked
    assert best / 2 <= min(batches) <= max(batches) <= 2 * best
    assert len(batches) >= 5
    assert {p.batch: p.samples for p in again.batches if p.batch in batches} == dict.fromkeys(batches, 20)


def test_what_was_timed_on_another_machine_is_left_out(monkeypatch):
    """A neighbour came: all takes ten times as long now, the size that was timed before as well, and says so."""

    def measured(workload, *, batches, earlier, **given):
        points = tuple(BatchPoint(b, "ok", 1e4 * throughput().step_s(b), samples=20, reason=None) for b in batches)
        return dataclasses.replace(earlier, batches=points, model=None, disturbed=("busy",))

    monkeypatch.setattr(bench, "measure_capacity", measured)
    best = bench.advise(capacity(), noise(400)).best_batch
    known = dataclasses.replace(capacity(batches=sorted({*BATCHES, best})))
    known = dataclasses.replace(known, batches=tuple(dataclasses.replace(p, samples=100) for p in known.batches))
    after = closer(known)
    assert after.batches == known.batches
    assert after.disturbed == ("busy",)
    assert after.notes[-1].text.endswith(f"beside it batch {best} took 10 times as long as before")
    beside = capacity(batches=sorted({p.batch for p in known.batches} | set(bench.closer(known, best))))
    again = closer(dataclasses.replace(beside, disturbed=("busy",)))
    assert not any("is left out" in note.text for note in again.notes)  # nothing new was timed


@pytest.mark.parametrize(("most", "expected"), [(160, [112, 160]), (150, [112]), (128, [112])])
def test_nothing_is_timed_beside_it_that_does_not_fit(most, expected):
    known = dataclasses.replace(capacity(batches=[32, 64, 128]), max_batch=most)
    assert bench.closer(known, 96) == [96]
    assert bench.closer(known, 128) == expected


@pytest.mark.parametrize("failure", [WorkloadError("it broke"), Interrupted(None), KeyboardInterrupt()])
def test_what_was_measured_stands_when_the_look_fails(monkeypatch, failure):
    def broken(*args, **given):
        raise failure

    monkeypatch.setattr(bench, "measure_capacity", broken)
    known = capacity(batches=BATCHES[::2])
    if isinstance(failure, WorkloadError):
        after = closer(known)
        assert after.batches == known.batches
        assert after.notes[-1].text.endswith("it broke")
        assert "was not timed after the verdict advised" in after.notes[-1].text
    else:
        with pytest.raises(KeyboardInterrupt):
            closer(known)


CPU = torch.device("cpu")


def sweep_of(**other):
    """A sweep of the quadratic here with critical batch 200, as one that chose its own optimizer and target."""
    info = Session(Quadratic(), CPU).info
    swept = dataclasses.replace(info, **({"target": {"train": 0.3}, "optimizer": "sgd", "learning_rate": 0.5} | other))
    steps = Convergence((SWEEP["fitted"][0],), optimizer="sgd", device=describe(CPU), workload=swept)
    return Run("2026-01-03T00:00:00+00:00", None, convergence=steps)


def test_what_is_timed_again_and_the_verdict_stand_on_a_sweep_that_is_given(asked):
    before = capacity(batches=BATCHES)
    found = bench._Found.begun(Quadratic(), CPU, BenchOptions(), None, sweep_of())
    info, device = found.sweep.convergence.workload, found.sweep.convergence.device
    found.capacity, found.noise = dataclasses.replace(before, workload=info, device=device), noise(4000)
    first, alone = found.run(), bench.advise(found.capacity, found.noise).best_batch
    assert first.verdict.critical_source == "sweep"
    assert [c.critical_batch for c in first.convergence.curves] == [200.0]
    known = found.capacity
    found.capacity = bench._closer(Quadratic(), CPU, BenchOptions(), found, 3.0, None)
    [(batches, _, _)] = asked
    assert set(bench.closer(known, first.verdict.best_batch)) <= set(batches)
    assert not set(bench.closer(known, alone)) <= set(batches)  # that of the noise scale is elsewhere
    again = found.run()
    assert set(batches) <= {p.batch for p in again.capacity.batches}
    assert again.verdict.critical_source == "sweep"


def test_a_run_that_goes_on_has_nothing_of_the_sweep_beside_the_one_before():
    """It was taken for branches that stand, and its noise scale for the run's own."""
    before = bench._Found.begun(Quadratic(), CPU, BenchOptions(thorough=True), None, sweep_of())
    info, device = before.sweep.convergence.workload, before.sweep.convergence.device
    before.capacity = dataclasses.replace(capacity(batches=BATCHES), workload=info, device=device)
    before.sweep = dataclasses.replace(before.sweep, noise=noise(900))
    cut = before.run()
    assert cut.verdict.critical_source == "sweep"
    assert cut.noise is None
    kept = resume.own(cut)
    assert (kept.convergence, resume.standing_branches(kept)) == (None, None)
    assert "branches" not in resume.notes(kept, "now")[-1].text


def test_a_look_that_fails_is_not_taken_again_and_a_busy_machine_has_one(monkeypatch):
    """Looks end where nothing new was timed, and neighbours are timed again in the first alone."""
    calls = []

    def measured(workload, *, batches=None, earlier=None, find_max_batch=True, **given):
        if find_max_batch:
            return dataclasses.replace(capacity(batches=BATCHES), disturbed=("busy",) if busy else ())
        calls.append(list(batches))
        if not busy:
            raise WorkloadError("it broke")
        points = tuple(BatchPoint(b, "ok", 1.02e3 * throughput().step_s(b), samples=20, reason=None) for b in batches)
        return dataclasses.replace(earlier, batches=points, model=None)

    monkeypatch.setattr(bench, "measure_capacity", measured)
    monkeypatch.setattr(bench, "measure_noise", lambda *_, **__: noise(400))
    for busy in (False, True):
        calls.clear()
        run = bench.run_bench(Quadratic(), BenchOptions(time_budget=30.0), device="cpu")
        assert len(calls) == 1
        assert len(calls[0]) == (5 if busy else 3)
        assert sum("it broke" in note.text for note in run.capacity.notes) == (not busy)


@pytest.mark.parametrize(("change", "told"), [
    ({"dtype": "bf16"}, "it is of quadratic, bf16, on"),
    ({"name": "text", "model": "lstm"}, "it is of text (lstm), fp32, on"),
    ({"options": {"d": 7}}, "with other options or another model file"),
])  # fmt: skip
def test_a_sweep_of_something_else_is_refused_before_anything_is_measured(change, told):
    with pytest.raises(UsageError, match="--sweep: ") as refused:
        bench.run_bench(Quadratic(), BenchOptions(), device="cpu", sweep=sweep_of(**change))
    assert told in str(refused.value)
    without = dataclasses.replace(sweep_of(), convergence=None)
    with pytest.raises(UsageError, match="no steps to a target"):
        bench.run_bench(Quadratic(), BenchOptions(), device="cpu", sweep=without)
