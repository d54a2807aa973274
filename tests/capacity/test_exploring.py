"""Which batch sizes are looked at where the time budget is short, on planted step times."""

from types import SimpleNamespace

import pytest
import torch

from pybatch.base.errors import WorkloadError
from pybatch.capacity import measurement
from pybatch.capacity.exploration import Explorer, Look, explore_doubling, explore_given
from pybatch.capacity.measurement import measure_capacity
from pybatch.jobs.bench import _staged
from pybatch.records import Ceilings
from pybatch.workloads.base import Workload


class Planted(Explorer):
    """Steps of so many seconds an example, whose looks let the clock go on."""

    def __init__(self, seconds, overhead=0.0):
        self.now, self.seconds, self.overhead = 0.0, seconds, overhead
        self.looks, self.memory_limit = {}, None
        self.clock, self.step = SimpleNamespace(now=lambda: self.now), SimpleNamespace(setup_s=0.0)

    def look(self, n):
        step_s = self.overhead + self.seconds * n
        self.now += 3 * step_s
        self.looks[n] = Look(n, "ok", None, step_s)
        return self.looks[n]

    look_again = look


def explored(seconds, doublings, budget=17.5, overhead=0.0):
    explorer = Planted(seconds, overhead)
    said = explore_doubling(explorer, 0.3 * budget, budget / 60, 0.6 * budget, doublings)
    return [look.batch for look in explorer.working], said


@pytest.mark.parametrize(("seconds", "batches"), [(0.1, [1, 4, 8]), (0.3, [1, 2, 4])])
def test_where_quadrupling_leaves_too_few_those_between_are_looked_at(seconds, batches):
    found, said = explored(seconds, 2)
    assert found == batches
    assert "would take too long" in said
    assert said.endswith(f", and batch {min(set(found) - {1, 4})} between")


def test_with_time_enough_nothing_is_between():
    found, said = explored(1e-3, 2, overhead=0.01)
    assert found == [4**i for i in range(len(found))]
    assert len(found) > 3
    assert "between" not in said


def test_one_doubling_at_a_go_passes_nothing_over():
    found, said = explored(0.5, 1)
    assert found == [1, 2]
    assert "between" not in said


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        (lambda n: n, 1),
        (lambda n: max(n, 2), 2),  # batch normalization
        (lambda n: -(-n // 32) * 32, 32),  # rows in packs, of the reference batch
        (lambda n: 32, None),
        (lambda n: 7, None),
    ],
)
def test_a_batch_that_ignores_its_size_is_refused_and_one_that_is_rounded_up_is_not(rows, first):
    """The first ran at the one batch size it returns, and ended in "too few batch sizes"."""

    def drawn(n):
        if rows(n) != n:
            error = WorkloadError(f"asked for {n}")
            error.rows = rows(n)
            raise error

    explorer = Explorer(SimpleNamespace(session=SimpleNamespace(batch=drawn), clear=lambda: None), None, None, None)
    explorer._run = drawn
    explorer.step.held_bytes, explorer.memory = 0, SimpleNamespace(rebase=lambda held: None)
    if first is not None:
        assert explorer.sanity(32) == first
    else:
        with pytest.raises(WorkloadError, match="asked for 1"):
            explorer.sanity(32)


def given(seconds, setup, budget=10.0):
    explorer = Planted(seconds)
    explorer.now = setup
    explore_given(explorer, [1, 2, 4], 0.6 * budget, budget / 60, budget)
    return [look.batch for look in explorer.working]


def test_a_slow_start_leaves_out_no_batch_size_whose_steps_are_short():
    assert given(1e-4, setup=9.0) == [1, 2, 4]
    assert given(1e-4, setup=11.0) == []
    assert given(0.01, setup=7.0) == [1, 2]  # 50 steps of all three take 3.5 s
    assert given(0.01, setup=1.0) == [1, 2, 4]


class Linear(Workload):
    """A step that takes next to nothing."""

    name = "linear"

    def model(self):
        return torch.nn.Linear(4, 1)

    def batch(self, n, generator, split="train"):
        return torch.randn(n, 4, generator=generator)

    def loss(self, model, batch):
        return model(batch).square().mean()


class Lines:
    """Progress with lines that stay."""

    def __init__(self):
        self.said = []

    def __call__(self, text, share):
        self.said.append(text)

    def line(self, text):
        self.said.append(f"line: {text}")


@pytest.mark.parametrize("sizes", [2, 3])
def test_too_few_batch_sizes_are_told_before_they_are_timed(monkeypatch, one_thread, sizes):
    def few(explorer, *given):
        for n in range(1, sizes + 1):
            explorer.look(n)
        return "time ended before batch 4"

    monkeypatch.setattr(measurement, "explore_doubling", few)
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))
    lines = Lines()
    measure_capacity(
        Linear(), device="cpu", time_budget=0.2, find_max_batch=False, progress=_staged(lines, "capacity", 0.0, 1.0)
    )
    told = [i for i, text in enumerate(lines.said) if text.startswith("line: ")]
    timing = next(i for i, text in enumerate(lines.said) if "rest" in text or "steady" in text)
    if sizes == 3:
        assert not told
        return
    [place] = told
    assert place < timing
    assert lines.said[place] == (
        "line: capacity: 2 batch sizes of the 3 that a fit needs: time ended before batch 4. Raise the time budget"
    )
