"""`measure_noise` along a stretch of training: what it means, and why one point of a run will not do."""

import math

import pytest
from cases.noise_models import Regression

from pybatch.noise import measurement
from pybatch.noise.measurement import STRETCH_STEPS, measure_noise
from pybatch.records import Run
from pybatch.report.run import sections
from pybatch.workloads.running.finding import find

pytestmark = pytest.mark.usefixtures("one_thread")


class Falling(Regression):
    """Trained fast: |G|^2 falls by orders of magnitude over the stretch, B_simple stays d + 1."""

    learning_rate = 3e-2


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("source", ["micro-batches", "per-example"])
def test_the_closed_form_holds_while_the_loss_falls(source):
    found = [
        measure_noise(Falling(), device="cpu", seed=seed, warmup_steps=5, micro_batch=16, source=source)
        for seed in range(6)
    ]
    assert {f.status for f in found} == {"resolved"}
    assert sum(f.low <= 64 <= f.high for f in found) >= 5
    assert math.exp(sum(math.log(f.b_simple) for f in found) / 6) == pytest.approx(64, rel=0.12)
    assert all(0 < f.stretch_steps <= STRETCH_STEPS for f in found)
    held = measure_noise(Falling(), device="cpu", warmup_steps=5, micro_batch=16, source=source, hold=True)
    assert held.stretch_steps == 0
    assert min(f.loss for f in found) < 0.8 * held.loss  # the loss is that of the stretch, which fell


def test_runs_from_different_seeds_agree_along_a_stretch_and_not_at_a_point(monkeypatch):
    """At a point |G|^2 is what the last steps happened to leave: seeds 1 and 3 of the digits are ten times apart."""

    def spread(width, **options):
        monkeypatch.setattr(measurement, "WIDTH", width)  # ten times apart is told from as wide an interval
        found = [measure_noise(find("digits"), device="cpu", seed=seed, **options).b_simple for seed in (1, 3)]
        return max(found) / min(found)

    assert spread(0.6, hold=True) > 4
    assert spread(0.3) < 2


@pytest.mark.usefixtures("wide")
def test_training_steps_are_no_pairs_whichever_source():
    """Hooks see every backward pass: those of the training between groups must not count."""
    for options in ({}, {"preconditioned": True}, {"source": "per-example"}):
        held = measure_noise(Regression(), device="cpu", warmup_steps=5, micro_batch=16, hold=True, **options)
        found = measure_noise(Regression(), device="cpu", warmup_steps=5, micro_batch=16, **options)
        assert found.steps <= found.stretch_steps <= STRETCH_STEPS  # the pilot's groups are in the stretch too
        assert (found.small_batch, found.skipped) == (held.small_batch, 0)
        assert not any("one micro-batch" in note.text for note in found.notes)


def test_a_wide_interval_says_that_the_stretch_ended():
    found = measure_noise(find("digits", options=["subset=0.25"]), device="cpu")
    assert found.stretch_steps == STRETCH_STEPS
    assert any(n.figure == "noise.low" and "400 training steps, the most made" in n.text for n in found.notes)


def test_without_a_warm_up_the_parameters_are_held():
    assert measure_noise(Regression(), device="cpu", warmup_steps=0).stretch_steps == 0
    assert measure_noise(Regression(), device="cpu", warmup_steps=0, hold=False).stretch_steps > 0


def test_training_goes_on_in_training_mode_while_the_noise_is_of_evaluation():
    modes = []

    class Watched(Regression):
        def loss(self, model, batch):
            modes.append((model.training, len(batch)))
            return super().loss(model, batch)

    measure_noise(Watched(), device="cpu", warmup_steps=3, micro_batch=16, mode="eval", time_budget=5)
    assert {training for training, n in modes if n == 16} == {False}
    assert {training for training, n in modes if n == Watched.reference_batch} == {True}


def test_the_report_says_over_which_steps():
    found = measure_noise(Regression(), device="cpu", warmup_steps=5, time_budget=5)
    [section] = sections(Run("", None, noise=found))
    said = dict(section.lines)["measured"]
    assert said.startswith(f"over {found.stretch_steps} training steps after 5 warm-up steps")
