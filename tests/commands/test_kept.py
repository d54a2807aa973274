"""What was measured is kept, in every command, whatever ends it: a fault, a signal, a call that does not return."""

import json
import os
import re
import signal
import sqlite3
import time

import pytest
import torch
from cases import hostile

from pybatch.base.errors import WorkloadError
from pybatch.records import Run
from pybatch.report.output import Output
from pybatch.workloads.base import Workload
from pybatch.workloads.running import calls
from pybatch.workloads.running.session import Session

FILE = """
import signal, torch, pybatch
class Mine(pybatch.Workload):
    name, unit, target, evaluation_examples, reference_batch = "mine", "rows", {"train": 0.5}, 32, 4
    calls, at = 0, AT
    def model(self): return torch.nn.Linear(8, 2)
    def batch(self, n, generator, split="train"):
        type(self).calls += 1
        if type(self).calls >= self.at:
            END
        x = torch.randn(n, 8, generator=generator) * 4
        return x, (x[:, 0] > 0).long()
    def loss(self, model, batch): return torch.nn.functional.cross_entropy(model(batch[0] / 2), batch[1])
"""
COMMANDS = {
    "sweep": "--batch 4,8 --rates 0.01,0.3 --seeds 1 --max-steps 40 --noise-budget 0",
    "branch": "--checkpoints 1,2 --factors 1,2 --seeds 1",
    "bench": "--batch 1,2,4 --time-budget 3",
}
RAISE, TERMINATE, INTERRUPT = (
    "raise OSError('disk gone')",
    "type(self).at = 10**9; signal.raise_signal(signal.SIGTERM)",
    "type(self).at = 10**9; signal.raise_signal(signal.SIGINT)",
)


@pytest.fixture
def run_with(tmp_path, one_thread):
    """Run a command on a workload whose batch() does something from some call on; its status, record and stderr."""

    def run(command, at, end, *more):
        path = tmp_path / f"mine{at}_{abs(hash(end))}.py"
        path.write_text(FILE.replace("AT", str(at)).replace("END", end))
        out = tmp_path / "run.json"
        arguments = ["--cpu", "-q", "--workload", f"{path}:Mine", *COMMANDS[command].split(), "-o", str(out), *more]
        status, _, err = hostile.typed(command, *arguments)
        assert [left.name for left in tmp_path.glob(".*")] == []
        return status, Run.from_json(out.read_text()) if out.exists() else None, err

    return run


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """How often batch() is called until the first checkpoint has been branched from."""
    from pybatch.branch.measurement import measure_branches
    from pybatch.workloads.running.finding import find

    path = tmp_path_factory.mktemp("counted") / "mine.py"
    path.write_text(FILE.replace("AT", "10**9").replace("END", "pass"))
    work = find(f"{path}:Mine")
    measure_branches(work, checkpoints=[1], factors=[1, 2], seeds=1, device="cpu")
    return type(work).calls


@pytest.mark.parametrize("end", [RAISE, TERMINATE, INTERRUPT])
@pytest.mark.parametrize("stored", [True, False])
def test_a_sweep_that_fails_at_its_45th_batch(run_with, tmp_path, stored, end):
    store = ("--store", str(tmp_path / "runs.db")) if stored else ()
    status, run, err = run_with("sweep", 45, end, *store)
    assert (status, run.complete) == (3, False), err
    texts = " ".join(note.text for note in (*run.notes, *run.convergence.notes, *run.convergence.curves[0].notes))
    assert "--resume" in texts or "no trial was stored" in texts
    assert ("disk gone" in texts) == (end == RAISE)


def test_outcomes_before_the_failure_are_in_store_and_record(run_with, tmp_path):
    flags = ("--store", str(tmp_path / "runs.db"), "--batch", "4,8,16")
    status, run, err = run_with("sweep", 70, RAISE, *flags)
    assert status == 3, err
    with sqlite3.connect(tmp_path / "runs.db") as db:
        [count] = db.execute("SELECT count(*) FROM trial").fetchone()
    assert count > 0
    assert run.convergence.trials > 0


@pytest.mark.parametrize("end", [RAISE, TERMINATE, INTERRUPT])
def test_branches_before_the_failure_are_kept(run_with, counted, end):
    status, run, err = run_with("branch", counted + 4, end)
    assert (status, run.complete) == (3, False), err
    assert [at.step for at in run.convergence.branches] == [1]


@pytest.mark.parametrize("end", [RAISE, TERMINATE, INTERRUPT])
def test_a_bench_that_is_ended_keeps_its_figures(run_with, end):
    status, run, err = run_with("bench", 20, end)
    assert (status, run.complete) == (3, False), err
    assert run.capacity.batches


def test_a_fault_of_pybatch_keeps_the_record_too(run_with, monkeypatch):
    def fail(*_, on_partial, **__):
        on_partial(hostile.record().capacity)
        raise KeyError("a fault")

    monkeypatch.setattr("pybatch.jobs.bench.measure_capacity", fail)
    status, run, err = run_with("bench", 10**9, "pass")
    assert (status, run.complete) == (70, False)
    assert "what was measured is kept" in err
    assert any("KeyError" in note.text for note in run.notes)


class Blocked(Workload):
    name = "blocked"

    def model(self):
        return torch.nn.Linear(3, 1)

    def batch(self, n, generator, split="train"):
        time.sleep(60)  # the line that is named

    def loss(self, model, batch):
        return model(batch).mean()


def test_a_call_that_does_not_return_is_told_of_and_ended(monkeypatch):
    monkeypatch.setattr(calls, "TOLD", 0.2)
    monkeypatch.setattr(calls, "_LOOK", 0.05)
    monkeypatch.setattr(calls, "grace", lambda budget: 0.1)
    session, said, begin = Session(Blocked(), torch.device("cpu")), [], time.monotonic()
    with calls.watched(said.append, 0.5), pytest.raises(WorkloadError) as error:
        session.batch(4)
    assert time.monotonic() - begin < 5
    [told] = said
    here = r"stands at .*test_kept\.py, line \d+: `time\.sleep\(60\)  # the line that is named`"
    assert re.search(r"Blocked\.batch\(\) has not returned for .* s; it " + here, told)
    assert re.search(r"had not returned after .* when the time budget of 0\.5 s was over", str(error.value))


def test_ctrl_c_in_a_call_is_ctrl_c(monkeypatch):
    class Interrupted(Blocked):
        def batch(self, n, generator, split="train"):
            signal.raise_signal(signal.SIGINT)

    session = Session(Interrupted(), torch.device("cpu"))
    with calls.watched(lambda text: None, 1e3), pytest.raises(KeyboardInterrupt):
        session.batch(4)


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path):
    path = tmp_path / "run[1].json"
    abandoned, young, foreign = (
        tmp_path / f".{name}" for name in ("run[1].json.a.writing", "run[1].json.b.writing", "run[1].json.mine")
    )
    for left in (abandoned, young, foreign):
        left.write_text("{")
    for left in (abandoned, foreign):
        os.utime(left, (time.time() - 7200,) * 2)
    with Output(path) as file:
        assert sorted(left.exists() for left in (abandoned, young, foreign)) == [False, True, True]
        file.write(json.dumps({}))
    assert path.read_text() == "{}"
    assert not abandoned.exists()


def test_a_call_that_swallows_the_interruption_is_given_up(monkeypatch):
    """The process is ended then, by whoever is told: nothing else ends such a call."""
    for name, value in (("_LOOK", 0.02), ("_AGAIN", 0.05), ("grace", lambda budget: 0.1)):
        monkeypatch.setattr(calls, name, value)
    given_up, swallowed = [], []

    class Swallowing(Blocked):
        def batch(self, n, generator, split="train"):
            while not given_up:
                try:
                    time.sleep(0.01)
                except KeyboardInterrupt as error:
                    swallowed.append(error)
            return torch.zeros(n, 3)

    session = Session(Swallowing(), torch.device("cpu"))
    with calls.watched(lambda said: None, 0.2, given_up.append):
        session.batch(4)
    assert len(swallowed) == 3
    assert re.search(r"Swallowing\.batch\(\) had not returned after .*, and it can't be interrupted$", given_up[0])
