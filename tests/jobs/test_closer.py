"""After the first verdict the advised batch is timed, where it was not: by a measurement that is planted here."""

import dataclasses

import pytest
import torch
from cases.verdicts import BATCHES, capacity, noise, throughput

from pybatch.base.errors import Interrupted, WorkloadError
from pybatch.jobs import bench
from pybatch.jobs.options import BenchOptions
from pybatch.records import BatchPoint
from pybatch.workloads.quadratic import Quadratic


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
    assert len(batches) == 1
    [batch] = batches
    assert batch not in BATCHES[::2]
    assert earlier.batches == ()  # nothing is measured again
    assert (given["find_max_batch"], given["time_budget"]) == (False, 3.0)
    assert after.model == before.model
    assert [p.batch for p in after.batches] == sorted((*BATCHES[::2], batch))
    assert "timed after the first verdict" in after.notes[-1].text
    assert bench.advise(after, noise(400)).why("best_batch").inputs["largest_measured"] == 4096


def test_one_that_was_timed_is_not_timed_again_but_on_a_disturbed_machine(asked):
    best = bench.advise(capacity(), noise(400)).best_batch
    known = capacity(batches=sorted({*BATCHES, best}))
    assert closer(known) is known
    assert closer(capacity(), batches=BATCHES) == capacity()  # the user chose
    assert asked == []
    disturbed = dataclasses.replace(known, disturbed=("other processes kept 1.9 of 2 cores busy",))
    again = closer(disturbed)
    [(batches, _, _)] = asked
    assert best / 2 <= min(batches) <= max(batches) <= 2 * best
    assert len(batches) >= 3
    assert {p.batch: p.samples for p in again.batches if p.batch in batches} == dict.fromkeys(batches, 20)


@pytest.mark.parametrize("failure", [WorkloadError("it broke"), Interrupted(None), KeyboardInterrupt()])
def test_what_was_measured_stands_when_the_look_fails(monkeypatch, failure):
    def broken(*args, **given):
        raise failure

    monkeypatch.setattr(bench, "measure_capacity", broken)
    known = capacity(batches=BATCHES[::2])
    if isinstance(failure, WorkloadError):
        after = closer(known)
        assert after.batches == known.batches
        assert "was not timed: it broke" in after.notes[-1].text
    else:
        with pytest.raises(KeyboardInterrupt):
            closer(known)
