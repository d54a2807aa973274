"""Two runs side by side as they are printed."""

import dataclasses

from pybatch.answer.changes import compare
from pybatch.report.changes import sections


def renamed(run, **changes):
    capacity = run.capacity
    return dataclasses.replace(
        run, capacity=dataclasses.replace(capacity, workload=dataclasses.replace(capacity.workload, **changes))
    )


def test_runs_of_different_things_say_so_before_they_are_judged(run):
    first, *rest = sections(compare(run, renamed(run, name="another", dtype="bf16")))
    assert first.title == "Not of the same thing: what changed may be that"
    busy = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, disturbed=("others at work",)))
    assert sections(compare(run, busy))[0].title == "Disturbed: what changed may be that"
    assert sections(compare(run, busy))[0].notes == ("machine disturbed in the new run: others at work",)
    assert first.notes == (f"workload name: {run.capacity.workload.name} against another",)
    assert rest[0].title == "Change, new against old"
    assert any(note.startswith("differs between the runs: dtype") for note in rest[0].notes)
    assert sections(compare(run, run))[0].title == "Change, new against old"
