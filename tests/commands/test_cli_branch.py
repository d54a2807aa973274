"""`pybatch branch`, `bench --thorough`, and the dials of workloads, as a user types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pybatch.jobs.bench as job
from pybatch import cli
from pybatch.base.errors import Interrupted
from pybatch.branch.measurement import measure_branches
from pybatch.records import Run

Typed = Callable[..., tuple[int, str, str]]
SHORT = ("--cpu", "--checkpoints", "5,10", "--factors", "0.5,1,2,4", "--seeds", "2")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run a command line in this process: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pybatch", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def test_branch_prints_a_row_for_each_checkpoint_and_writes_the_record(typed: Typed, tmp_path: Path) -> None:
    path, keep = tmp_path / "run.json", tmp_path / "kept"
    status, out, err = typed("branch", *SHORT, "--batch", "16", "--keep", keep, "-o", path)
    assert status == 0, err
    assert "Critical batch along the run" in out
    assert "batches 8, 16, 32, 64" in out
    assert {p.name for p in keep.iterdir()} == {"step-5.pt", "step-10.pt"}
    run = Run.from_json(path.read_text())
    assert run.convergence is not None
    assert [b.step for b in run.convergence.branches] == [5, 10]
    assert run.environment.command.startswith("pybatch branch --cpu")
    assert "branches at step" in err


def test_branch_towards_a_target_begins_before_half_the_way(typed: Typed) -> None:
    """Digits, untrained at 2.3, is at 2 in some 10 steps: a checkpoint past that is moved, and the record says so."""
    command = ("branch", "--cpu", "--checkpoints", "40", "--factors", "0.5,1,2", "--seeds", "1", "--target")
    status, out, err = typed(*command, "2", "--format", "json", "-q")
    assert status == 0, err
    found = json.loads(out)["convergence"]
    assert found["branches"][0]["step"] < 40
    assert any("the base run is at the target by step" in note["text"] for note in found["notes"])
    status, _, err = typed(*command, "nan")
    assert status == 2
    assert "target 'nan': a loss to reach is finite and above 0" in err


def test_branch_on_a_dialled_workload_in_json(typed: Typed) -> None:
    command = ("branch", "--workload", "quadratic", "--option", "d=10", "--option", "noise=0.5", *SHORT)
    status, out, _ = typed(
        *command, "--optimizer", "sgd", "--lr", "0.1", "--rule", "constant", "--format", "json", "-q"
    )
    assert status == 0
    data = json.loads(out)
    assert data["workload"]["options"] == {"d": 10, "spectrum": 1.0, "noise": 0.5}
    assert data["convergence"]["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--factors", "1,two"), "factors '1,two': 'two' is no such number. Write '0.5,1,2,4'"),
        (("--checkpoints", "5,-1"), "checkpoints '5,-1': '-1' is no such number"),
        (("--checkpoints", "5.5"), "'5.5' is no such number"),
        (("--time-budget", "0"), "time budget 0 s is out of range"),
        (("--option", "depth=3"), "option 'depth' is not known"),
        (("--cpu", "--gpu", "0"), "exclude each other"),
        (("--seeds", "0"), "seeds 0 is out of range"),
        (("--optimizer", "adma"), "Did you mean"),
    ],
)
def test_bad_words_are_refused_with_the_remedy(typed: Typed, words: tuple[str, ...], says: str) -> None:
    place = () if "--gpu" in words else ("--cpu",)
    status, out, err = typed("branch", *place, *words)
    assert (status, out) == (2, "")
    assert says in err


def test_a_time_budget_too_short_for_all_leaves_with_status_3(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))  # a second a look
    monkeypatch.setattr("pybatch.branch.measurement.time.monotonic", lambda: float(next(clock)))
    status, out, _ = typed("branch", *SHORT, "--time-budget", "90", "-q")
    assert status == 3
    assert "within the time budget. Raise it" in " ".join(out.split())


def test_an_interrupted_run_is_delivered(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from pybatch.workloads.running.finding import find

    partial = measure_branches(find("digits"), device="cpu", checkpoints=[5], factors=[0.5, 1, 2], seeds=1)

    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupted(partial)

    monkeypatch.setattr("pybatch.jobs.branch.measure_branches", interrupt)
    status, out, _ = typed("branch", *SHORT, "--format", "json", "-q")
    data = json.loads(out)
    assert status == 3
    assert data["complete"] is False
    assert data["convergence"]["branches"][0]["step"] == 5
    assert "interrupted" in data["notes"][0]["text"]


def test_thorough_takes_the_critical_batch_from_branches(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    asked: dict[str, Any] = {}

    def short(workload: Any, **options: Any) -> Any:
        asked.update(options)
        given = {"checkpoints": [10], "factors": [0.25, 0.5, 1, 2, 4], "seeds": 2}
        return measure_branches(workload, **(options | given))

    monkeypatch.setattr(job, "measure_capacity", lambda *_, **__: run.capacity)
    monkeypatch.setattr(job, "measure_noise", lambda *_, **__: run.noise)
    monkeypatch.setattr(job, "measure_branches", short)
    status, out, _ = typed("bench", "--cpu", "--thorough", "--format", "json", "-q")
    data = json.loads(out)
    assert status == 0
    assert data["verdict"]["critical_source"] == "branch"
    both = sorted((data["convergence"]["branches"][0]["fit"]["critical_batch"], run.noise.b_simple))
    assert both[0] < data["verdict"]["critical_batch"] < both[1]  # weighed with the noise scale
    assert 100 < asked["time_budget"] <= 180
    status, out, _ = typed("bench", "--cpu", "--format", "json", "-q")
    assert json.loads(out)["verdict"]["critical_source"] == "noise"
    assert json.loads(out)["convergence"] is None


def test_list_names_the_dials(typed: Typed) -> None:
    status, out, _ = typed("list")
    assert status == 0
    text = " ".join(out.split())
    for word in ("scenes", "quadratic", "cifar10", "mnist", "textfile", "imagefolder", "label_noise=", "clutter="):
        assert word in text
    assert "--option DIAL=VALUE" in text
