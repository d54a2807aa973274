"""`with pybatch.watch():`, and progress that is said by default."""

import sys

import pytest
import torch

import pybatch
from pybatch.base import progress
from pybatch.base.errors import UsageError
from pybatch.records import Ceilings, Run
from pybatch.watch import replay


def steps(count=40):
    model = torch.nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


def test_a_context_watches_what_is_trained_in_it(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr("pybatch.capacity.timing._QUANTUM_S", 0.01)
    monkeypatch.setattr(replay, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))
    with pybatch.watch(tmp_path / "run.json", html=tmp_path / "page.html", time_budget=0.3) as watched:
        steps()
    said = capsys.readouterr()
    assert said.out == ""
    assert "watching Linear (18 parameters) with SGD" in said.err
    assert "Training" in said.err
    assert Run.from_json((tmp_path / "run.json").read_text()) == watched.run
    assert (tmp_path / "page.html").exists()
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    assert not [hook for hook in hooks.values() if "pybatch" in hook.__module__]


def test_an_error_in_it_is_passed_on_with_what_was_measured(capsys):
    def fails():
        steps(43)
        return 1 / 0

    watched = pybatch.watch(quiet=True)
    with pytest.raises(ZeroDivisionError), watched:
        fails()
    assert watched.run.training.steps == 43
    noise = watched.run.noise
    assert (noise.last_step, noise.trajectory[-1].last_step) == (43, 43)  # the last pair stands for fewer than others
    assert watched.run.verdict is None
    assert capsys.readouterr().err == ""


def test_the_first_lines_say_why_there_is_no_noise_scale(monkeypatch, one_thread):
    """They said "measure again", and the batch normalization that was behind it stood at the page's end."""
    monkeypatch.setattr("pybatch.capacity.timing._QUANTUM_S", 0.01)
    monkeypatch.setattr(replay, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))
    with pybatch.watch(quiet=True, time_budget=0.3) as watched:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
    said = watched.run.verdict.why("critical_batch").text
    assert said.startswith("the noise scale was not measured: ")
    assert "BatchNorm1d" in said
    assert "SGD keeps no two moments" in said


def test_nothing_trained_is_said(capsys, tmp_path):
    with pybatch.watch(tmp_path / "run.json") as watched:
        pass
    assert watched.run is None
    said = capsys.readouterr().err
    assert "what was looked for is a torch.optim.Optimizer that steps in this process, or 8 backward passes" in said
    assert said.endswith(f". Not written: {tmp_path / 'run.json'}\n")


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UsageError, match="optimizer_index -1"):
        pybatch.watch(optimizer_index=-1)
    with pytest.raises(UsageError, match="time budget"):
        pybatch.watch(time_budget=-1.0)
    with pytest.raises(UsageError, match="no format known"):
        pybatch.watch(tmp_path / "run.what")


def test_a_room_does_not_take_the_name_of_the_function():
    import pybatch.watch.steps  # binds `pybatch.watch` where nothing stops it

    assert callable(pybatch.watch)
    assert sys.modules["pybatch.watch.steps"].Steps


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_said_where_somebody_looks(monkeypatch, terminal):
    given = []

    @progress.told
    def measure(name, *, progress=None):
        given.append(progress)
        return name

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert measure("x") == "x"
    own = print
    measure("x", progress=own)
    assert (given[0] is not None) == terminal
    assert given[1] is own
