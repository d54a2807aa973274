"""`pybatch sweep` as a user types it: flags, exit status, and a run killed on the way and resumed."""

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time

import pytest

from pybatch import cli
from pybatch.base.errors import Interrupted
from pybatch.records import Convergence, Run
from pybatch.sweep.options import SweepOptions


@pytest.fixture
def pybatch(monkeypatch, capsys):
    """Type a command; returns (exit status, stdout, stderr)."""

    def type_(text):
        monkeypatch.setattr(sys, "argv", ["pybatch", *shlex.split(text)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return type_


@pytest.fixture
def swept(monkeypatch, run):
    """Replace the sweep by a ready record; returns the arguments it was called with."""
    import pybatch.jobs.sweep

    calls = []

    def run_sweep(workload, options, **arguments):
        calls.append(arguments | {"workload": workload, "options": options})
        return Run(run.created, run.environment, convergence=Convergence(()))

    monkeypatch.setattr(pybatch.jobs.sweep, "run_sweep", run_sweep)
    return calls


def test_flags_reach_the_sweep(pybatch, swept, tmp_path):
    status, _, err = pybatch(
        "sweep --cpu --workload digits --model cnn --batch '16-64*2' --rule constant,sqrt --seeds 2 --base-batch 32 "
        "--target train=0.1,test=0.2 --optimizer sgd:momentum=0.9 --rates 0.1,1e-2 --max-steps 70 --jobs 2 "
        f"--noise-budget 3 --store {tmp_path}/runs.db --resume --seed 5 --search grid --base-rate 0.25 --dtype bf16 "
        "--gap-epochs 9 --schedule wsd --beta2-rule half-life --decay-rule linear"
    )
    assert (status, err) == (0, "")
    [given] = swept
    assert given["workload"].model_name == "cnn"
    assert given["options"] == SweepOptions(
        batches=(16, 32, 64),
        rules=("constant", "sqrt"),
        seeds=2,
        seed=5,
        target={"train": 0.1, "test": 0.2},
        optimizer="sgd",
        options={"momentum": 0.9},
        schedule="wsd",
        beta2_rule="half-life",
        decay_rule="linear",
        rates=(0.01, 0.1),
        search="grid",
        base_batch=32,
        base_rate=0.25,
        max_steps=70,
        dtype="bf16",
        gap_epochs=9.0,
    )
    assert (given["jobs"], given["noise_budget"], given["resume"], given["ray"]) == (2, 3.0, True, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 8-4*2", "start 8 is above stop 4"),
        ("--target low", "KEY=VALUE"),
        ("--optimizer sgd:lr=1", "the sweep chooses"),
        ("--rates fast", "no such number"),
        ("--resume", "--store FILE"),
        ("--noise-budget -1", "noise budget"),
        ("--rule tuend --noise-budget 0", "Did you mean 'tuned'"),
        ("--target train=9 --noise-budget 0", "met before the first step"),
    ],
)
def test_bad_flags_exit_2_and_print_nothing(pybatch, flags, message):
    status, out, err = pybatch(f"sweep --cpu -q {flags}")
    assert (status, out) == (2, "")
    assert message in err


def test_ctrl_c_writes_what_is_done_and_exits_3(pybatch, swept, monkeypatch, run, tmp_path):
    from pybatch.jobs import sweep

    def stopped(workload, options, **_):
        raise Interrupted(
            Run(run.created, run.environment, convergence=Convergence((), complete=False), complete=False)
        )

    monkeypatch.setattr(sweep, "run_sweep", stopped)
    path = tmp_path / "run.json"
    status, _, _ = pybatch(f"sweep --cpu -o {path}")
    assert status == 3
    assert json.loads(path.read_text())["convergence"]["complete"] is False


def rows(path):
    db = sqlite3.connect(path)
    found = db.execute("SELECT key, created, steps FROM trial ORDER BY key").fetchall()
    db.close()
    return found


def test_a_killed_sweep_keeps_its_trials_and_is_resumed(pybatch, tmp_path):
    path, out = tmp_path / "runs.db", tmp_path / "run.json"
    flags = f"sweep --cpu -q --batch 32,64,128 --seeds 2 --rates 0.4,0.8,100 --target train=0.7 --store {path}"
    command = [sys.executable, "-m", "pybatch", *shlex.split(flags), "--noise-budget", "0"]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            time.sleep(0.02)
            if path.exists():
                try:
                    if rows(path):
                        break
                except sqlite3.OperationalError:  # its tables are not there yet
                    continue
        child.kill()
    before = rows(path)
    assert before
    status, _, _ = pybatch(f"{flags} --noise-budget 0 --resume -o {out}")
    assert status == 0
    after = rows(path)
    kept = [row for row in before if row in after]
    assert len(kept) >= len(before) - 2  # one given up early may be run on: nothing that met its target is run twice
    assert len({key for key, *_ in after}) == len(after) == json.loads(out.read_text())["convergence"]["trials"]


@pytest.mark.parametrize("rates", ["1E-1,2.5e+0", "0.1,2.5", ".1,2.5"])
def test_rates_in_any_usual_spelling(pybatch, swept, rates):
    status, _, _ = pybatch(f"sweep --cpu --rates {rates}")
    assert status == 0
    assert swept[0]["options"].rates == (0.1, 2.5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--batch 16,32,64 --rates 5e5,1e6 --max-steps 40", "all trials diverged. Give lower learning rates"),
        (
            "--batch 16,32,64 --rates 1e-6 --max-steps 20",
            "no batch size reached the target .* Try higher rates; or give a higher target",
        ),
        ("--batch 256 --rates 0.5,1 --max-steps 60", "one batch size shows no dependence on it. Give at least three"),
        ("--batch 512,1024,2048 --rates 1 --max-steps 60", "batch 2048 is larger than the data set of 1437 examples"),
    ],
)
def test_what_cannot_give_a_critical_batch_is_said_once_with_what_to_change(pybatch, flags, says):
    status, out, _ = pybatch(f"sweep --cpu -q --noise-budget 0 --seeds 1 --target train=0.9 --verbose {flags}")
    assert status == (3 if "not run" in out else 0)  # batches between two that fail are left out
    notes = [" ".join(note.split()) for note in out.split("·")[1:]]
    assert sum(bool(re.search(says, note)) for note in notes) == 1
    assert len({note.partition(":")[2] for note in notes}) == len(notes)
    assert not any("edge" in note for note in notes if "diverged" in out)
