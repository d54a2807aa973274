"""Where the time of a step goes, by a clock that is set by hand."""

import pytest

from pybatch.answer.input import with_input
from pybatch.records import Training, Verdict
from pybatch.watch.steps import PARTS, Steps
from pybatch.watch.summary import _shares


class Clock:
    """Marks are seconds; the device is never behind."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def reached(self, mark):
        return True

    def seconds(self, first, last):
        return last - first


def made(steps, clock, count, *, micro=1, wait=5.0, loading=0.0, size=8, evaluated=(), closure=False):
    """Steps of: waiting, forward 2, backward 3 (each of `micro` passes), between 1, update 4."""
    for step in range(count):
        if step in evaluated:
            steps.unusual()
        if closure:
            steps.updating()
        for _ in range(micro):
            clock.now += wait
            steps.loaded(loading)
            steps.forward()
            clock.now += 2
            steps.backward(size if step % 10 != 9 else size // 2, cleared=closure)
            clock.now += 3
            steps.passed()
        clock.now += 1
        if not closure:
            steps.updating()
        clock.now += 4
        steps.updated()


def steps_of(count=40, **how):
    clock = Clock()
    steps = Steps(clock)
    steps.updated()
    steps.count -= 1
    made(steps, clock, count, **how)
    steps.settle()
    return steps


def parts(steps):
    return dict(zip(PARTS, steps.usual[0].parts, strict=True))


def test_parts_add_up_to_the_step():
    steps = steps_of(micro=2)
    assert parts(steps) == {"waiting": 10.0, "forward": 4.0, "backward": 6.0, "between": 1.0, "update": 4.0}
    assert steps.usual[0].seconds == 25.0
    assert (steps.micro_batch, steps.accumulation, steps.count) == (8, 2, 40)


def test_an_evaluation_or_another_size_is_not_usual():
    steps = steps_of(evaluated=(12, 13))
    assert len(steps.usual) == 40 - 3 - 2 - 4  # warm-up, evaluations, the last batches of epochs
    assert {step.sizes for step in steps.usual} == {(8,)}


def test_passes_within_the_optimizers_step():
    """A closure's passes over the same examples: cleared gradients are no part of the update."""
    found = parts(steps_of(micro=3, closure=True))
    assert found == {"waiting": 0.0, "forward": 6.0, "backward": 9.0, "between": 0.0, "update": 3 * 5.0 + 5.0}
    assert steps_of(micro=3, closure=True).accumulation == 1


@pytest.mark.parametrize(("workers", "needed"), [(0, 1), (1, 2), (2, 4)])
def test_workers_that_would_keep_up(workers, needed):
    """Waiting 6 of 16 s. Without workers a batch takes 6 s to load; with w of them, w batches take 16 s each."""
    found = _shares(steps_of(wait=6.0, loading=6.0).usual, workers, 1)
    assert found["waiting"] == pytest.approx(6 / 16)
    assert found["script"] == pytest.approx(0.0)
    assert found["workers_needed"] == needed


def test_what_the_script_does_between_steps_is_told_from_waiting():
    found = _shares(steps_of(wait=6.0, loading=2.0).usual, 0, 1)
    assert found["waiting"] == pytest.approx(2 / 16)
    assert found["script"] == pytest.approx(4 / 16)
    assert sum(found[name] for name in (*PARTS, "script")) == pytest.approx(1.0)
    assert _shares(steps_of().usual, None, 1)["waiting"] == pytest.approx(5 / 15)
    assert _shares(steps_of().usual, None, 2)["waiting"] is None  # another optimizer's steps lie between


VERDICT = Verdict(None, None, None, None, None, None, None, None, "noise", None, None, "Use 8. So it is. More.",
                  answer="Use 8.", because="So it is.")  # fmt: skip


def waits(share, workers, needed, cores=8, step_ms=100.0):
    training = Training("t.py", "Net", "SGD", waiting=share, workers=workers, workers_needed=needed, step_ms=step_ms)
    return with_input(VERDICT, training, cores)


def test_waiting_for_data_comes_first():
    found = waits(0.41, 2, 6)
    assert found.limit == "input"
    assert found.because.startswith("The device waits for data 41.0 % of the time: 6 workers would do (it has 2). A")
    assert found.text == f"Use 8. {found.because} More."
    assert found.why("limit").inputs["workers_needed"] == 6
    assert "there are 4 cores: make examples cheaper" in waits(0.41, 2, 6, cores=4).because
    assert "in a DataLoader" in waits(0.41, None, None).because


def test_without_workers_a_larger_batch_gains_what_is_not_waiting():
    """ "A larger batch helps nothing" was said where it tripled the rate: data and steps take turns there."""
    found = waits(0.2, 0, 1)
    assert found.limit == VERDICT.limit
    assert "Before that a larger batch gains 5 times the rate at most. So it is." in found.because
    assert found.why("input").inputs["gain_at_most"] == pytest.approx(5.0)
    assert "gains" not in waits(0.13, 0, 1).because  # 7.7 times, beside a ceiling that is much nearer
    assert waits(0.6, 0, 1).limit == "input"
    assert "gains 1.7 times" in waits(0.6, 0, 1).because
    assert "helps nothing" in waits(0.2, 2, 3).because  # the workers' rate is the training's


@pytest.mark.parametrize("given", [(0.05, 2, 3), (None, 2, 3), (0.2, None, None), (0.3, None, None, 8, 1.0)])
def test_little_waiting_is_not_told(given):
    assert waits(*given) == VERDICT
