"""The processes that stand for Python in the tests end, are killed and are spoken to as Python is."""

import os
import signal
import subprocess
import time

import pytest
from cases import warm

NESTED = "import subprocess, sys\nprint(sys.executable, flush=True)\nsubprocess.run([sys.executable, '-c', {!r}])"
WRITES = "import time\nwhile True:\n    open('alive', 'a').write('x'); time.sleep(0.01)"


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [
        ("import sys; print(sys.argv, sys.stdin.read()); sys.exit(5)", 5, "['-c', 'a'] asked\n", ""),
        ("import sys; sys.exit('why')", 1, "", "why\n"),
        ("import atexit; atexit.register(print, 'last'); print(open('here').read())", 0, "there\nlast\n", ""),
        ("import os; print(os.environ['OWN'], 'HOME' in os.environ); os.kill(os.getpid(), 9)", -9, "", ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "", "KeyboardInterrupt\n"),
        ("import os; os.write(1, os.environ['OWN'].encode()); 1 / 0", 1, "1", "ZeroDivisionError: division by zero\n"),
        ("import torch; print(torch.get_num_threads())", 0, "3\n", ""),
    ],
)
def test_it_ends_as_python_does(warm_python, tmp_path, code, status, out, err):
    (tmp_path / "here").write_text("there")
    environment = {"OWN": "1", "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [warm_python, "-c", code, "a"], cwd=tmp_path, env=environment, input="asked", capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stdout == out or status == -9  # what it had not flushed is lost
    assert done.stderr.endswith(err)
    assert bool(done.stderr) == bool(err)


def test_a_script_and_a_module_have_their_own_place(warm_python, tmp_path):
    (tmp_path / "own.py").write_text("import sys; print(__name__, __file__, sys.argv, sys.path[:2])")
    environment = os.environ | {"PYTHONPATH": "/first"}
    for asked in (["own.py"], ["-m", "own"]):
        told = subprocess.run(
            [warm_python, *asked, "-x"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        path = str(tmp_path / "own.py")
        named = path if "-m" in asked else "own.py"
        assert told.stdout == f"__main__ {named} {[named, '-x']} {[str(tmp_path), '/first']}\n"


def test_a_safe_path_does_not_hold_the_folder_one_is_in(warm_python, tmp_path):
    """`-P`, with which pybatch's own children start: a checkout that happens to be here is not taken."""
    (tmp_path / "shadow.py").write_text("")
    for flags, status in (([], 0), (["-P"], 1)):
        done = subprocess.run([warm_python, *flags, "-c", "import shadow"], cwd=tmp_path, capture_output=True)
        assert done.returncode == status


def test_kill_takes_what_it_started_along(warm_python, tmp_path):
    environment = os.environ | {warm.CHILDREN: warm_python}
    command = [warm_python, "-c", NESTED.format(WRITES)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == warm_python
        while not (tmp_path / "alive").exists():
            time.sleep(0.01)
        process.send_signal(warm.KILL)
    assert process.returncode == -signal.SIGKILL
    time.sleep(0.3)
    before = (tmp_path / "alive").stat().st_size
    time.sleep(0.2)
    assert (tmp_path / "alive").stat().st_size == before
