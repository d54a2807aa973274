"""Every example as a reader runs it, on fewer steps: what it prints is what its first lines promise.

several_devices.py is run in tests/noise/test_distributed.py, by processes that are there.
"""

import ast
import re
import runpy
import shlex
import sys

import pytest
import torch
from cases.paths import ROOT

from pybatch import cli
from pybatch.records import Ceilings, Run
from pybatch.watch import replay

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


def test_a_script_that_is_watched_trains_as_without(ran, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replay, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))
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


def test_a_workload_from_a_dataset(ran):
    assert "critical batch is" in ran("from_dataset.py", "2")


def test_padded_sentences_are_weighed_by_their_tokens(ran):
    said = ran("padded_language_model.py", "6")
    assert scale(said) > 1
    assert re.search(r"or \d+ tokens, [\d.]+ of them a sentence", said)


@pytest.mark.filterwarnings("default")  # the trainer warns of other people's packages
def test_the_hugging_face_recipe(ran):
    said = ran("hugging_face.py", "--steps", "24")
    assert scale(said) > 1


def test_a_sweep_finds_a_critical_batch_and_goes_on_from_its_store(ran, tmp_path):
    said = ran("sweep.py", "--store", "runs.db", "--largest", "32", "--seeds", "1")
    assert "tuned, train loss 0.3:" in said
    assert "sqrt, train loss 0.3:" in said
    assert (tmp_path / "runs.db").stat().st_size > 0
    assert ran("sweep.py", "--store", "runs.db", "--largest", "32", "--seeds", "1") == said  # nothing is trained again


def test_logs_of_ones_own(ran):
    said = ran("own_logs.py")
    assert re.search(r"critical batch \d+ \[\d+, \d+\]", said)
