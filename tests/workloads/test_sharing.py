"""A workload's code runs in pybatch's process: what it sets at first holds or is put back, later it is refused."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.device.environment import capture
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session
from pybatch.workloads.running.sharing import changes, state

CPU = torch.device("cpu")
SOUND = """
class Mine(pybatch.Workload):
    name = "mine"
    def __init__(self): {constructed}
    def model(self): return torch.nn.Linear(3, 1)
    def batch(self, n, generator, split="train"): return torch.randn(n, 3, generator=generator)
    def loss(self, model, batch): return model(batch).square().mean()
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, environ = state(), dict(os.environ)
    yield
    changes(before)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environ)


def written(folder: Path, imported: str = "", constructed: str = "pass") -> str:
    text = f"import os, random, signal, sys\nimport numpy, torch, pybatch\n{imported}\n"
    path = folder / f"mine{abs(hash((imported, constructed)))}.py"
    path.write_text(text + SOUND.format(constructed=constructed))
    return f"{path}:Mine"


PATH = tuple(sys.path)
PUT_BACK = {
    "os.chdir('/')": os.getcwd,
    "sys.argv[:] = ['other']": lambda: list(sys.argv),
    "sys.argv = ['other']": lambda: list(sys.argv),
    "sys.path.clear()": lambda: set(PATH) <= set(sys.path),
    "sys.path = []": lambda: set(PATH) <= set(sys.path),
    "sys.stdout = sys.stderr": lambda: id(sys.stdout),
    "sys.stderr = None": lambda: id(sys.stderr),
    "signal.signal(signal.SIGINT, signal.SIG_IGN)": lambda: signal.getsignal(signal.SIGINT),
    "signal.signal(signal.SIGTERM, lambda *_: None)": lambda: signal.getsignal(signal.SIGTERM),
    "os.environ['HOME'] = '/nowhere'": lambda: os.environ.get("HOME"),
    "os.environ.pop('PATH')": lambda: os.environ.get("PATH"),
    "random.seed(1)": lambda: random.getstate()[1],
    "numpy.random.seed(1)": lambda: np.random.get_state()[1].tolist(),  # type: ignore[index]
    "torch.manual_seed(1)": lambda: torch.get_rng_state().tolist(),
    "torch.set_default_device('meta')": lambda: str(torch.get_default_device()),
}


@pytest.mark.parametrize("said", PUT_BACK)
@pytest.mark.parametrize("at", ["imported", "constructed"])
def test_what_is_not_numerical_is_put_back(said: str, at: str, tmp_path: Path) -> None:
    look: Callable[[], Any] = PUT_BACK[said]
    before = look()
    find(written(tmp_path, **{at: said}))
    assert look() == before


def test_a_folder_added_to_the_path_of_imports_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    find(written(tmp_path, "sys.path.insert(0, '/added')"))
    assert sys.path[0] == "/added"


@pytest.mark.parametrize("at", ["imported", "constructed"])
def test_numerical_settings_hold_and_are_recorded(at: str, tmp_path: Path) -> None:
    wanted = max(1, torch.get_num_threads() - 1)
    said = (
        f"torch.set_num_threads({wanted}); torch.set_float32_matmul_precision('high'); "
        "torch.use_deterministic_algorithms(True); os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'"
    )
    Session(find(written(tmp_path, **{at: said})), CPU)
    found = capture(seed=0)
    assert found.threads == wanted
    assert found.variables["torch.float32_matmul_precision"] == "high"
    assert found.variables["torch.deterministic_algorithms"] == "True"
    assert found.variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("at", ["imported", "constructed"])
def test_a_file_that_reads_its_command_line_sees_none(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pybatch's own arguments are none of the file's, whose parser would refuse them."""
    monkeypatch.setattr(sys, "argv", ["pybatch", "bench", "--workload", "mine.py:Mine"])
    parsed = "import argparse; p = argparse.ArgumentParser(); p.add_argument('--width', default=8); p.parse_args()"
    find(written(tmp_path, **{at: parsed}))
    assert sys.argv == ["pybatch", "bench", "--workload", "mine.py:Mine"]
    with pytest.raises(
        (UsageError, WorkloadError), match=r"run without arguments\. .*under: if __name__ == '__main__'"
    ):
        find(written(tmp_path, parsed.replace("default=8", "required=True")))


@pytest.mark.parametrize("raised", ["sys.exit()", "sys.exit('gone')", "raise SystemExit(0)", "1 / 0"])
def test_a_file_that_ends_the_process_is_refused(raised: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"workload file '.*' cannot be loaded: (SystemExit|ZeroDivisionError)"):
        find(written(tmp_path, raised))
    with pytest.raises(WorkloadError, match=r"Mine\(\) of workload '.*' raised (SystemExit|ZeroDivisionError)"):
        find(written(tmp_path, constructed=raised if not raised.startswith("raise") else "sys.exit(0)"))


class Planted(Workload):
    """A linear model, one of whose methods does something beside."""

    name = "planted"

    def __init__(self, method: str, does: Callable[[], object]) -> None:
        self._method, self._does = method, does

    def _maybe(self, method: str) -> None:
        if method == self._method:
            self._does()

    def model(self) -> torch.nn.Module:
        self._maybe("model")
        return torch.nn.Linear(3, 1)

    def batch(self, n: int, generator: torch.Generator, split: str = "train") -> Any:
        self._maybe("batch")
        return torch.randn(n, 3, generator=generator)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self._maybe("loss")
        found: torch.Tensor = model(batch).square().mean()
        return found


def step(work: Workload, session: Session | None = None, count: int = 1) -> None:
    session = session or Session(work, CPU)
    for _ in range(count):
        session.backward(session.batch(4))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "folder": (lambda: os.chdir("/"), r"the folder \(from .* to /\)"),
    "argv": (lambda: sys.argv.append("x"), "sys.argv"),
    "path": (lambda: sys.path.clear(), "sys.path"),
    "stdout": (lambda: setattr(sys, "stdout", None), "sys.stdout"),
    "stderr": (lambda: setattr(sys, "stderr", None), "sys.stderr"),
    "signal": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "the handler of SIGINT"),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), r"torch.num_threads \(from \d+ to \d+\)"),
    "precision": (lambda: torch.set_float32_matmul_precision("high"), "torch.float32_matmul_precision"),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), "torch.deterministic_algorithms"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "torch.default_dtype"),
    "device": (lambda: torch.set_default_device("meta"), "torch.default_device"),
    "variable": (lambda: os.environ.update(OMP_NUM_THREADS="77"), "OMP_NUM_THREADS"),
    "seed": (lambda: torch.manual_seed(torch.initial_seed() % 1000 + 1), "seed of torch's generator"),
}


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("method", ["model", "batch", "loss"])
def test_a_change_in_the_middle_is_refused_by_name_and_put_back(method: str, change: str) -> None:
    if (method, change) == ("model", "seed"):
        return  # a model is drawn beside the generator of all else
    does, says = REFUSED[change]
    before = state()
    with pytest.raises(WorkloadError, match=rf"Planted\.{method}\(\) of workload 'planted' changes .*{says}.*top of"):
        step(Planted(method, does))
    left = {key for key, value in state().items() if value != before[key]}
    assert left <= {"seed of torch's generator"}


def test_a_change_that_comes_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are looked at every half second, or in every one of a pretended clock."""
    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) == 20:
            os.chdir("/")

    monkeypatch.setattr("pybatch.workloads.running.sharing._LATER", 0.0)
    session = Session(Planted("loss", late), CPU)
    with pytest.raises(WorkloadError, match="the folder"):
        step(session.workload, session, 30)
    assert len(calls) == 20


def test_a_change_between_two_looks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def second() -> None:
        calls.append(1)
        if len(calls) == 2:  # the first is looked at, and then those of half a second later
            os.chdir("/")
        if len(calls) == 4:
            monkeypatch.setattr(session._lookout, "_next", 0.0)

    session, before = Session(Planted("loss", second), CPU), os.getcwd()
    with pytest.raises(WorkloadError, match="the folder"):
        step(session.workload, session, 30)
    assert (len(calls), os.getcwd()) == (4, before)  # found in the batch() that follows


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("name", ""),
        ("name", 5),
        ("unit", None),
        ("learning_rate", float("nan")),
        ("learning_rate", -1.0),
        ("learning_rate", "fast"),
        ("reference_batch", 0),
        ("reference_batch", 2.5),
        ("reference_batch", True),
        ("examples", -3),
        ("examples", "many"),
        ("target", {"train": float("inf")}),
        ("target", [0.1]),
        ("options", {"dial": [1]}),
        ("model_name", 3),
    ],
)
def test_what_a_class_says_of_itself_is_checked(attribute: str, value: Any) -> None:
    work = Planted("none", lambda: None)
    setattr(work, attribute, value)
    with pytest.raises(WorkloadError, match=rf"Planted\.{attribute} is .*: it must be"):
        Session(work, CPU)
