"""What speaks against a verdict is in its first lines."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pybatch.records import Capacity, Training, Verdict
from pybatch.watch.doubts import with_doubts
from pybatch.watch.replay import _alone

VERDICT = Verdict(*[None] * 8, "noise", None, None, "Use 8. So it is. More.", answer="Use 8.", because="So it is.")
# Passes of (30 + 50) / 4 = 20 ms and an update of 10 ms.
TRAINING = Training(
    "t.py", "Net", "SGD", batch=64, micro_batch=16, accumulation=4, step_ms=100.0, forward=0.3, backward=0.5, update=0.1
)


def capacity(step_ms, disturbed=()):
    points = tuple(SimpleNamespace(batch=n, step_ms=step_ms * n / 16) for n in (8, 16, 64))
    return Capacity(*[None] * 10, batches=points, disturbed=disturbed)


@pytest.mark.parametrize(("step_ms", "told"), [(30, False), (24, False), (38, False), (22, True), (41, True)])
def test_a_replay_that_takes_another_time(step_ms, told):
    """At the same batch: one pass and an update of the script's."""
    found = with_doubts(VERDICT, capacity(step_ms), TRAINING)
    assert (found != VERDICT) == told
    if told:
        assert found.because.startswith("Forward, backward and update took 30 ms in the script and ")
        assert f"{step_ms} ms in the replay" in found.because
        assert found.because.endswith("So it is.")
        assert found.text == f"Use 8. {found.because} More."
    assert with_doubts(VERDICT, capacity(step_ms), None) == VERDICT  # no replay was made


def test_a_disturbed_machine():
    found = with_doubts(VERDICT, capacity(30, ("others kept 3 of 8 cores busy",)), TRAINING)
    assert found.because == "The machine was disturbed (others kept 3 of 8 cores busy): measure again. So it is."
    again = replace(VERDICT, answer="Measure again before trusting this. Use 8.")
    assert (
        with_doubts(again, capacity(30, ("steal",)), TRAINING).because == "The machine was disturbed (steal). So it is."
    )


def test_why_no_other_batch_size_was_timed():
    look = lambda status, late=False: SimpleNamespace(status=status, late=late, reason="too odd")  # noqa: E731
    looks = {8: look("ok"), 16: look("skipped", True)}
    text = _alone(8, looks, 2.0)
    assert (
        text == "no other batch size than 8 was timed: the time budget of 2 s ended before. Give more by --time-budget"
    )
    assert _alone(8, looks | {4: look("ok")}, 2.0) == text  # looked at, but with no time left
    assert _alone(8, looks | {2: look("skipped")}, 2.0) == "no other batch size than 8 runs: too odd"
