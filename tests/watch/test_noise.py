"""How often the noise of a watched training is measured, and what stands when that changes."""

import itertools

import pytest
import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.watch import noise as source
from pybatch.watch.batching import find_batching
from pybatch.watch.noise import NoiseWatch

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """Steps of two micro-batches by a clock of the test's own."""

    def __init__(self, monkeypatch):
        torch.manual_seed(0)
        self.model = nn.Linear(8, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.watch = NoiseWatch(self.model, self.optimizer, 2, None, False)
        self.now = 0.0
        monkeypatch.setattr(source.time, "perf_counter", lambda: self.now)

    def steps(self, count, plain=0.1, watched=0.1, after=None, noise=None):
        before = False
        for _ in range(count):
            for _ in range(2):
                x = torch.randn(4, 8)
                y = (x[:, 0] > 0).long()
                if not self.watch.begun:
                    self.watch.begin(find_batching(((x,), {})), self.model, (x,), {})
                nn.functional.cross_entropy(self.model(x), y).backward()
            self.watch.stepping(8)
            usual = after if before and after else plain
            self.now += (watched if self.watch.watched else usual) * (next(noise) if noise else 1.0)
            before = self.watch.watched
            self.optimizer.step()
            self.watch.stepped()
            self.optimizer.zero_grad()


def test_a_costly_source_measures_more_seldom(monkeypatch):
    training = Training(monkeypatch)
    training.steps(40, watched=0.15)
    before = training.watch._every
    assert before == pytest.approx(0.5 / source._COST, rel=0.05)  # half a step more, every so many


def test_the_step_after_a_watched_one_counts_as_its_cost(monkeypatch):
    """From the first: a step in between is plain, though the noise is measured as often as it will ever be."""
    training = Training(monkeypatch)
    training.steps(40, watched=0.11, after=0.14)
    assert training.watch._every == pytest.approx(0.5 / source._COST, rel=0.05)
    training.steps(20 * training.watch._every, watched=0.15, after=0.14)
    assert training.watch._every == pytest.approx(0.9 / source._COST, rel=0.05)


def test_times_that_scatter_do_not_hide_the_cost(monkeypatch):
    """A tenth of a step, where four steps in seven take 1.4 times as long: quantiles of both sides are compared."""
    training = Training(monkeypatch)
    training.steps(30, watched=0.11, noise=itertools.cycle([1.0, 1.0, 1.0, 1.4, 1.4, 1.4, 1.4]))
    assert training.watch._every >= 0.1 / source._COST


def test_a_slow_spell_discards_nothing_that_was_measured(monkeypatch):
    training = Training(monkeypatch)
    training.steps(100 * source._FIRST)
    assert training.watch._every == source._FIRST
    known = training.watch.read()
    assert known.status == "resolved"
    training.steps(10 * source._FIRST, watched=0.3)
    assert training.watch._every == source._FIRST  # half of what is compared was not slow
    training.steps(10 * source._FIRST, watched=0.3)
    assert training.watch._every > source._FIRST
    training.steps(10)
    assert training.watch.read().status == "resolved"
    assert training.watch._handle.whole.steps >= training.watch._handle._accumulator._pairs > known.steps


def test_one_slow_step_is_no_cost(monkeypatch):
    training = Training(monkeypatch)
    for _ in range(10):
        training.steps(16)
        training.steps(2, plain=0.1, watched=1.0)
    assert training.watch._every == source._FIRST
    assert len(training.watch._others) <= source._LATEST


def test_what_a_source_knew_goes_on_in_the_next_one(monkeypatch):
    """Most of a long run was left out: what came after a source was made anew had too few pairs to be the answer."""
    training = Training(monkeypatch)
    training.steps(12 * source._FIRST, watched=0.11)
    once = training.watch._every
    training.steps(12 * once, watched=0.15)
    assert training.watch._every > once > source._FIRST  # made anew twice
    training.steps(10 * training.watch._every, watched=0.15)
    taken = 12 * (source._FIRST + once) + 10 * training.watch._every
    whole, newest = training.watch._handle.whole, training.watch.read()
    assert training.watch._ended == []
    assert whole.steps >= 12 + 10 + 6
    assert newest.trajectory[0].first_step == 1
    assert newest.last_step == pytest.approx(taken, rel=0.1)


def test_a_source_that_cannot_be_made_anew_leaves_what_it_knew(monkeypatch):
    """The script has put a hook on a parameter meanwhile."""
    training = Training(monkeypatch)
    training.steps(24)
    known = training.watch.read()

    def refused(offer):
        raise UsageError("parameter 'weight' has a hook.")

    monkeypatch.setattr(training.watch, "_make", refused)
    training.steps(40, watched=0.3)
    assert training.watch._handle is None
    assert len(training.watch._ended) == 1
    assert training.watch.reasons == ["parameter 'weight' has a hook"]
    assert training.watch.read().steps >= known.steps
    assert training.watch.reasons == ["parameter 'weight' has a hook"]
