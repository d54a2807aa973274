"""Each exit status has one meaning, and what was not foreseen is one sentence."""

import os
import re
import subprocess
import sys

import pytest
from cases import hostile

from pybatch import cli
from pybatch.base import faults


def fail(*_, **__):
    raise KeyError("unforeseen\nand more")


@pytest.mark.parametrize("does", [fail, lambda **_: sys.exit(0), lambda **_: sys.exit(1), lambda **_: [][1]])
def test_what_was_not_foreseen_is_a_sentence_and_a_file(monkeypatch, tmp_path, does):
    monkeypatch.setattr(cli, "app", does)
    monkeypatch.setattr(faults.tempfile, "tempdir", str(tmp_path))
    status, out, err = hostile.typed("bench")
    assert (status, out, err.count("\n")) == (70, "", 1)
    assert re.search(r"a fault of pybatch itself \(\w+.*\)\. Please report it .* with the traceback in /", err)
    [kept] = tmp_path.glob("pybatch-fault-*.txt")
    assert str(kept) in err
    assert "Traceback" in kept.read_text()


def test_without_a_place_for_the_traceback_it_is_printed(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(faults.tempfile, "tempdir", str(tmp_path / "gone"))
    status, _, err = hostile.typed("bench")
    assert status == 70
    assert "KeyError" in err


def test_a_full_disk_is_no_fault_of_pybatch(monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device", "runs.json")

    monkeypatch.setattr(cli, "app", full)
    status, _, err = hostile.typed("report")
    assert status == 3
    assert "'runs.json' cannot be written: No space left on device" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing_is_said():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pybatch", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "No space left" in done.stderr


NINES = "9" * 5000


@pytest.mark.parametrize(
    "command",
    [
        "sweep --target train=-1",
        "sweep --target train=0",
        "sweep --target train=1e999",
        "sweep --target train=nan",
        f"sweep --target train={NINES}",
        f"sweep --rates {NINES}",
        "sweep --rates 1e308",
        "sweep --rates 1e999",
        "sweep --base-rate 1e308 --rule linear",
        "sweep --base-rate nan --rule linear",
        f"sweep --seeds {NINES}",
        "sweep --seeds 99999999999",
        "sweep --max-steps 99999999999999999999",
        "sweep --batch 99999999999999999999999999",
        "sweep --batch 1-9223372036854775807*2",
        f"sweep --batch {NINES}",
        "sweep --batch 8-64*1e308",
        "sweep --jobs 9999999",
        "sweep --gap-epochs 1e308",
        "sweep --gap-epochs nan",
        "sweep --noise-budget 1e308",
        "sweep --noise-budget nan",
        "sweep --optimizer sgd:momentum=9e999",
        f"sweep --optimizer sgd:momentum={NINES}",
        f"sweep --optimizer sgd:momentum={'(' * 3000}",
        f"sweep --optimizer sgd:momentum={'-' * 30000}1",
        "sweep --base-batch 0",
        "sweep --base-batch 99999999999999999999",
        "bench --time-budget 1e308",
        f"bench --time-budget {NINES}",
        f"bench --seed {NINES}",
        f"bench --batch {NINES}",
        "branch --lr 1e308",
        "branch --lr nan",
        "branch --lr -1",
        "branch --tolerance 1e999",
        f"branch --factors {NINES}",
        f"branch --checkpoints {NINES}",
        "branch --checkpoints 99999999999999999999999",
        "branch --seeds 99999999999999",
        "branch --batch 99999999999999999999999",
        "compare RUN RUN --fail-on throughput:-300%",
        "compare RUN RUN --fail-on throughput:-100%",
        f"compare RUN RUN --fail-on throughput:-{NINES}%",
        f"compare RUN RUN --fail-on throughput:+{'9' * 400}%",
        "report RUN --target train=-1",
    ],
)
def test_numbers_that_are_none_are_refused_in_few_words(command, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(hostile.SOUND[0])
    monkeypatch.chdir(tmp_path)
    for job in ("bench.run_bench", "sweep.run_sweep", "branch.run_branches"):
        monkeypatch.setattr(f"pybatch.jobs.{job}", lambda *_, **__: pytest.fail("measured"))
    name, *rest = command.replace("RUN", "run.json").split()
    device = ["--cpu", "-q"] if name in ("bench", "sweep", "branch") else []
    done = hostile.typed(name, *device, *rest)
    assert hostile.complaint(done, (2,)) is None
    assert done[1] == ""
    assert len(done[2]) < 700
