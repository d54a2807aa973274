"""`pybatch watch` as it is typed: streams, statuses, files, Ctrl-C; the script runs as without."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pybatch.records import Run

SCRIPT = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"  # holds, as torch is not imported before
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
print("begun", torch.get_num_threads(), __name__, sys.argv[1:], flush=True)
try:
    for step in range(int(sys.argv[1])):
        optimizer.zero_grad()
        x = torch.randn(16, 8)
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        if step == 100 and "--fail" in sys.argv:
            raise RuntimeError("of the script")
finally:
    print("end", step, sum(p.double().sum().item() for p in model.parameters()), flush=True)
if "--status" in sys.argv:
    sys.exit(5)
"""
WATCH = ["-m", "pybatch", "watch", "--time-budget", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("watch")
    (path / "train.py").write_text(SCRIPT)
    return path


def ran(folder, *command):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def test_stdout_and_status_are_the_scripts(folder):
    plain = ran(folder, sys.executable, "train.py", "250", "--status")
    done = ran(folder, sys.executable, *WATCH, "-o", "run.json", "--html", "page.html", "train.py", "250", "--status")
    assert done.stdout == plain.stdout
    assert done.returncode == plain.returncode == 5
    assert "pybatch: watching Sequential (178 parameters) with AdamW" in done.stderr
    assert "Training\n" in done.stderr
    assert "best batch" in done.stderr
    assert "more notes: page.html, under Details" in " ".join(done.stderr.split()).replace(f"{folder}/", "")
    run = Run.from_json((folder / "run.json").read_text())
    assert (run.training.steps, run.training.batch, run.complete) == (250, 16, True)
    assert run.noise.source == "per-example"
    page = (folder / "page.html").read_text()
    assert "Where the time of a step goes" in page
    assert not (folder / "run.json.partial").exists()


def test_a_script_that_fails_keeps_its_traceback_and_what_was_measured(folder, warm_python):
    done = ran(folder, warm_python, *WATCH, "-o", "failed.json", "train.py", "250", "--fail")
    assert done.stdout.splitlines()[-1].startswith("end 100")
    assert done.returncode == 1
    line = next(i for i, text in enumerate(SCRIPT.splitlines(), 1) if "raise" in text)
    trace = done.stderr[done.stderr.index("Traceback") :]
    assert "pybatch: until then B_simple " in done.stderr.removesuffix(trace)
    assert trace.splitlines()[1] == f'  File "{folder / "train.py"}", line {line}, in <module>'
    assert trace.endswith("RuntimeError: of the script\n")
    assert "pybatch" not in trace
    run = Run.from_json((folder / "failed.json").read_text())
    assert (run.training.steps, run.complete, run.verdict) == (101, False, None)
    assert any("RuntimeError" in note.text for note in run.notes)


def test_ctrl_c_leads_to_the_verdict_and_a_second_one_to_the_record(folder, warm_python):
    """One process each: the first Ctrl-C in the training, a second one in the replays."""
    for output, twice in (("once.json", False), ("twice.json", True)):
        budget = ["--time-budget", "60"] if twice else []
        process = subprocess.Popen(
            [warm_python, *WATCH, *budget, "-o", output, "train.py", "100000000"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout.readline().startswith("begun")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("end")
        if twice:
            while "replay" not in (line := process.stderr.readline()):
                assert line
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert twice or "pybatch: verdict in up to 2 s; Ctrl-C again for the record alone\n" in said
        assert process.returncode == 130
        run = Run.from_json((folder / output).read_text())
        assert not run.complete
        assert run.training.steps > 20
        assert (run.verdict is None) == twice
        assert json.loads((folder / output).read_text())["training"]["batch"] == 16


ARGUED = """
import sys
print(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "typed",
    [
        ["-m", "argued"],
        ["-q", "--time-budget", "2", "-m", "argued"],
        ["--time-budget=2", "--module=argued"],
        ["-margued"],
        ["-qm", "argued"],
        ["-o", "m.json", "--module", "argued"],
        ["argued.py"],
        ["-q", "--", "argued.py"],
    ],
)
def test_what_follows_the_script_or_module_is_its_own(folder, typed, capsys, monkeypatch):
    """Options of pybatch's names too, as Python leaves them to `-m`."""
    from pybatch import cli

    (folder / "argued.py").write_text(ARGUED)
    own = ["--lr", "3e-4", "-q", "x", "--steps", "7", "--", "-m", "y"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in ("path", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", ["pybatch", "watch", *typed, *own])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (0, f"{own}\n"), said.err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["-m"], "requires an argument"),
        (["--what", "-m", "x"], "No such option"),
        ([], "no script was given"),
        (["nothing.py"], "'nothing.py' is not there"),
        (["--steps", "1", "train.py"], "steps 1"),
        (["-o", "run.what", "train.py"], "no format known"),
        (["--epochs", "3", "train.py"], "'pybatch watch train.py --epochs ...'"),
        (["--quiet", "-e3", "a b.py"], "'pybatch watch 'a b.py' -e ...'"),
    ],
)
def test_bad_arguments(folder, typed, message, capsys, monkeypatch):
    """Before anything of the script runs."""
    from pybatch import cli

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pybatch", "watch", *typed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import torch", "what was looked for"),
        ("pass", "never imported torch"),
        ("import torch\n1 / 0", "ZeroDivisionError ended the script before a training was seen"),
    ],
)
def test_files_that_are_not_written_are_told(folder, text, says, capsys, monkeypatch):
    """With the script's own status, also where nothing else is to be printed."""
    from pybatch import cli

    (folder / "nothing.txt").write_text(f"{text}\nraise SystemExit(7)\n")
    monkeypatch.chdir(folder)
    for name in ("path", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    if "torch" not in text:
        monkeypatch.setattr("pybatch.commands.watch.AfterTorch", Never)
    typed = ["-q", "-o", "none.json", "--html", "none.html", "nothing.txt"]
    monkeypatch.setattr(sys, "argv", ["pybatch", "watch", *typed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    failed = "1 / 0" in text
    assert (stop.value.code, said.out) == (1 if failed else 7, "")
    assert says in said.err
    told = said.err.partition("Traceback")[0]
    assert failed == (told != said.err)
    assert told.endswith(f". Not written: {folder / 'none.json'}, {folder / 'none.html'}\n")
    assert not (folder / "none.json").exists()


class Never:
    """As where torch is not imported, which it is in this process."""

    def __init__(self, then):
        pass

    def remove(self):
        pass


def test_an_option_of_pybatchs_that_went_to_the_script_is_told(folder, capsys, monkeypatch):
    """Only where the script refused its arguments: it may have an option of the same name."""
    from pybatch import cli

    (folder / "args.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    (folder / "exits.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(folder)
    for name in ("path", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    for script, status, told in (("args.py", 2, True), ("exits.py", 1, False)):
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        monkeypatch.setattr(sys, "argv", ["pybatch", "watch", script, "--html=page.html"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == status
        assert ("--html=page.html came after the script" in capsys.readouterr().err) == told
