"""A bench run and a sweep of one workload become one run; what may not belong together stays apart."""

import dataclasses

import pytest
from cases.verdicts import SWEEP

from pybatch.answer.merge import join
from pybatch.answer.verdict import advise
from pybatch.records import Convergence, Note, Run


@pytest.fixture
def bench(run):
    return dataclasses.replace(run, verdict=advise(run.capacity, run.noise))


@pytest.fixture
def sweep(run):
    workload = dataclasses.replace(run.capacity.workload, target={"train": 0.3}, learning_rate=None)
    steps = Convergence((SWEEP["fitted"][0],), optimizer="sgd", device=run.capacity.device, workload=workload)
    return Run("2026-01-03T00:00:00+00:00", run.environment, convergence=steps, notes=(Note("x", "of the sweep"),))


def test_the_verdict_of_both_stands_on_the_sweep(bench, sweep):
    for runs in ([bench, sweep], [sweep, bench]):
        [one] = join(runs)
        assert one.verdict == advise(bench.capacity, bench.noise, sweep.convergence)
        assert (one.verdict.critical_source, bench.verdict.critical_source) == ("sweep", "noise")
        assert one.verdict.time_to_target is not None
        assert [note.text for note in one.notes][:1] == ["of the sweep"]
        assert "sweep with sgd of 2026-01-03" in one.notes[-1].text
    ratios = {"noise_ratio": None, "noise_ratio_low": None, "noise_ratio_high": None}  # made with the bench's noise
    curves = Run.from_json(one.to_json()).convergence.curves
    assert tuple(dataclasses.replace(c, **ratios) for c in curves) == sweep.convergence.curves


def test_the_noise_scale_of_the_sweep_serves_a_run_without_one(bench, sweep):
    bare = dataclasses.replace(bench, noise=None, verdict=advise(bench.capacity))
    [one] = join([bare, dataclasses.replace(sweep, noise=bench.noise)])
    assert one.noise == bench.noise


@pytest.mark.parametrize("change", [{"dtype": "bf16"}, {"options": {"width": 8}}, {"name": "text"}, {"model": "cnn"}])
def test_another_workload_stays_apart(bench, sweep, change):
    other = dataclasses.replace(sweep.convergence.workload, **change)
    apart = dataclasses.replace(sweep, convergence=dataclasses.replace(sweep.convergence, workload=other))
    assert join([bench, apart]) == [bench, apart]


def state(sweep, changed, name="a", **changes):
    """A record of an experiment in a store, as of then."""
    steps = dataclasses.replace(sweep.convergence, experiment=name, changed=changed, **changes)
    return dataclasses.replace(sweep, convergence=steps)


def test_a_sweep_given_as_record_and_as_store_is_one(bench, sweep):
    record = state(sweep, "2026-01-03T00:00:00.5")
    stored = dataclasses.replace(record, created="2026-01-04T00:00:00+00:00", environment=None, notes=())
    assert join([stored, record]) == [stored]
    assert join([record, stored]) == [record]
    for runs in ([bench, stored, record], [record, bench, stored]):
        [one] = join(runs)
        assert one.verdict.critical_source == "sweep"


def test_of_two_states_of_a_sweep_the_later_one_is_kept(bench, sweep):
    """An earlier record hid what the store learned when it was resumed with --gap-epochs."""
    early, later = state(sweep, "2026-01-03T00:00:00"), state(sweep, "2026-01-03T00:00:00.5", gap_epochs=8.0)
    for runs in ([early, later], [later, early], [early, later, early]):
        assert join(runs) == [later]
    [both] = join([bench, early, later])
    assert both.convergence.gap_epochs == 8.0


def test_sweeps_of_other_stores_are_not_told_apart_by_what_they_found(bench, sweep):
    """The same figures of two measurements are two measurements; a record that names no store is of none."""
    for other in (state(sweep, "2026", "b"), sweep):
        assert join([state(sweep, "2026"), other]) == [state(sweep, "2026"), other]
    assert join([sweep, sweep]) == [sweep, sweep]
    assert len(join([bench, state(sweep, "2026"), state(sweep, "2026", "b")])) == 3


def test_what_is_not_clear_stays_apart(bench, sweep):
    elsewhere = dataclasses.replace(
        sweep,
        convergence=dataclasses.replace(sweep.convergence, device=dataclasses.replace(bench.capacity.device, name="X")),
    )
    nameless = dataclasses.replace(sweep, convergence=dataclasses.replace(sweep.convergence, workload=None))
    slower = dataclasses.replace(SWEEP["fitted"][0], target=0.2)
    second = dataclasses.replace(sweep, convergence=dataclasses.replace(sweep.convergence, curves=(slower,)))
    again = dataclasses.replace(bench, created="2026-01-05T00:00:00+00:00")
    for runs in ([bench, elsewhere], [bench, nameless], [sweep], [bench]):
        assert join(runs) == runs
    for runs, says in (
        ([bench, sweep, second], "without the 2 sweeps of this workload (sgd, sgd): which of them"),
        ([bench, again, sweep], "without the sweep of this workload (sgd), as several runs of it are here"),
    ):
        found = join(runs)
        assert says in found[0].notes[-1].text
        notes = [run.notes for run in runs]
        assert [dataclasses.replace(one, notes=own) for one, own in zip(found, notes, strict=True)] == runs


def test_of_several_sweeps_that_of_the_runs_own_optimizer_is_taken(bench, sweep):
    """A store of a sweep with sgd and one with adamw left the verdict on the noise scale."""

    def by(optimizer, **options):
        return dataclasses.replace(
            sweep, convergence=dataclasses.replace(sweep.convergence, optimizer=optimizer, optimizer_options=options)
        )

    def of(optimizer, **options):
        work = dataclasses.replace(bench.capacity.workload, optimizer=optimizer, optimizer_options=options)
        return dataclasses.replace(bench, capacity=dataclasses.replace(bench.capacity, workload=work))

    one, other = join([of("adamw"), by("sgd"), by("adamw")])
    assert (one.convergence.optimizer, one.verdict.critical_source) == ("adamw", "sweep")
    assert other == by("sgd")
    heavy = {"weight_decay": "0.1"}
    one, other = join([of("adamw", **heavy), by("adamw"), by("adamw", **heavy)])
    assert one.convergence.optimizer_options == heavy
    assert other == by("adamw")
    both = join([of("sgd"), of("adamw"), by("sgd"), by("adamw")])
    assert [one.convergence.optimizer for one in both] == ["sgd", "adamw"]
    lone = join([of("sgd"), of("adamw"), by("adamw")])
    assert [one.verdict.critical_source for one in lone] == ["noise", "sweep"]
    assert "without the sweep of this workload (adamw), as several runs" in lone[0].notes[-1].text
    none = join([of("lion"), by("sgd"), by("adamw", **heavy)])
    assert len(none) == 3
    assert "(sgd, adamw:weight_decay=0.1)" in none[0].notes[-1].text


def test_the_ratio_to_the_noise_scale_is_of_the_noise_scale_shown(bench, sweep):
    curve = dataclasses.replace(sweep.convergence.curves[0], noise_ratio=99.0)
    [one] = join(
        [bench, dataclasses.replace(sweep, convergence=dataclasses.replace(sweep.convergence, curves=(curve,)))]
    )
    found = one.convergence.curves[0]
    assert found.noise_ratio == pytest.approx(one.noise.b_simple / found.critical_batch)
    assert found.noise_ratio_low < found.noise_ratio < found.noise_ratio_high
