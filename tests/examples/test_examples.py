"""Every example as a reader runs it, on fewer steps: what it prints is what its first lines promise."""

import ast
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys

import pytest
import torch
from cases.paths import ROOT

from pybatch import cli
from pybatch.records import Run

EXAMPLES = ROOT / "examples"
SOURCES = sorted(EXAMPLES.glob("*.py"))
LONGEST = 60  # lines
TYPED = ("python ", "torchrun ", "pybatch ", "pip ")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    """Run an example as `python NAME ARGUMENTS` does, in a folder of its own; gives what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def scale(text):
    """The figure of a printed noise scale that is resolved."""
    found = re.search(r"B_simple ([\d.,]+) \[[\d.,]+ to [\d.,]+\] examples \(resolved, by ", text)
    assert found, text
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_is_short_is_run_here_and_names_commands_that_are_there(path):
    source = path.read_text()
    assert len(source.splitlines()) < LONGEST
    here = ast.unparse(ast.parse((ROOT / "tests" / "examples" / "test_examples.py").read_text()))
    assert path.name in here
    first = ast.get_docstring(ast.parse(source)).splitlines()
    typed = [shlex.split(line.split("#")[0]) for line in first if line.startswith(TYPED)]
    assert typed
    for words in typed:
        assert words[0] != "pybatch" or words[1] in cli.COMMANDS
        for word in words:
            assert not word.startswith("examples/") or (ROOT / word.partition(":")[0]).is_file()
    assert any(path.name in word for words in typed for word in words)


@pytest.mark.slow(seconds=4)
def test_a_script_that_is_watched_trains_as_without(ran, tmp_path, monkeypatch, capsys):
    plain = ran("train.py", "--epochs", "4")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    files = ["-o", "run.json", "--html", "page.html"]
    typed = ["watch", "--time-budget", "1", *files, str(EXAMPLES / "train.py"), "--epochs", "4"]
    monkeypatch.setattr(sys, "argv", ["pybatch", *typed])
    with torch.random.fork_rng(), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == plain != ""
    run = Run.from_json((tmp_path / "run.json").read_text())
    assert (run.training.batch, run.training.steps, run.noise.source) == (32, 4 * 45, "per-example")
    assert (tmp_path / "page.html").stat().st_size > 1e6


def test_the_fused_optimizer_takes_the_place_of_torchs(ran):
    said = ran("fused_optimizer.py", "--steps", "60")
    assert scale(said) > 1
    assert "states: 4 bytes a parameter" in said
    assert "torch's AdamW goes on at step 60" in said


def test_noise_in_a_loop(ran, tmp_path):
    said = ran("noise_in_a_loop.py", "--steps", "200", "--output", "noise.jsonl")
    assert scale(said) > 1
    assert len((tmp_path / "noise.jsonl").read_text().splitlines()) > 10


WORKER = """
import os, runpy, sys
for port, more in zip(sys.argv[2:], ([], ["--fsdp"])):
    os.environ["MASTER_PORT"] = port
    sys.argv[1:], kept = ["--steps", "40", *more], sys.argv[1:]
    runpy.run_path(kept[0], run_name="__main__")
    sys.argv[1:] = kept
sys.stdout.flush()
os._exit(0)  # gloo's own threads can abort the interpreter on its way out
"""


@pytest.mark.slow(seconds=8)
def test_ddp_and_fsdp2_measure_the_same_scale(tmp_path):
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    command = [sys.executable, "-c", WORKER, str(EXAMPLES / "several_devices.py"), *ports]
    around = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env=around | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said, errors = zip(*(process.communicate(timeout=100) for process in started), strict=True)
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    ddp, fsdp = said[0].splitlines()
    assert ddp.startswith("ddp: B_simple")
    assert fsdp.startswith("fsdp: B_simple")
    assert ddp.removeprefix("ddp").replace("by ddp", "") == fsdp.removeprefix("fsdp").replace("by fsdp", "")
    assert said[1] == ""


@pytest.mark.slow(seconds=4)
def test_a_workload_from_a_dataset(ran):
    assert "critical batch is" in ran("from_dataset.py", "2")


@pytest.mark.slow(seconds=4)
def test_padded_sentences_are_weighed_by_their_tokens(ran):
    said = ran("padded_language_model.py", "2")
    assert scale(said) > 1
    assert re.search(r"or [\d.]+ tokens, [\d.]+ of them a sentence", said)


@pytest.mark.slow(seconds=6)
@pytest.mark.filterwarnings("default")  # the trainer warns of other people's packages
def test_the_hugging_face_recipe(ran):
    said = ran("hugging_face.py", "--steps", "24")
    assert scale(said) > 1


@pytest.mark.slow(seconds=5)
def test_a_sweep_finds_a_critical_batch_and_goes_on_from_its_store(ran, tmp_path):
    said = ran("sweep.py", "--store", "runs.db", "--largest", "128", "--seeds", "1")
    assert "tuned, train loss 0.3:" in said
    assert "sqrt, train loss 0.3:" in said
    kept = (tmp_path / "runs.db").stat().st_mtime_ns
    assert ran("sweep.py", "--store", "runs.db", "--largest", "128", "--seeds", "1") == said
    assert kept


def test_logs_of_ones_own(ran):
    said = ran("own_logs.py")
    assert re.search(r"critical batch \d+ \[\d+, \d+\]", said)
