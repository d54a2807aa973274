"""What a workload writes to stdout, by whatever way, goes to stderr while it runs."""

import subprocess
import sys

import pytest

WAYS = {
    "python": "print('noise')",
    "descriptor": "os.write(1, b'noise')",
    "C": "ctypes.CDLL(None).printf(b'noise')",  # held back until the buffer is full
    "child": "subprocess.run([sys.executable, '-c', 'print(\"noise\")'])",
}
TEXT = """
import ctypes, os, subprocess, sys
from pybatch.commands.printing import stdout_to_stderr
print("before", flush=True)
try:
    with stdout_to_stderr():
        {}
        {}
except RuntimeError:
    pass
print("result")
"""


@pytest.mark.parametrize("end", ["", "raise RuntimeError"])
@pytest.mark.parametrize("way", WAYS)
def test_stdout_holds_the_result_alone(way, end):
    command = [sys.executable, "-c", TEXT.format(WAYS[way], end)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["before", "result"]
    assert "noise" in done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_is_left_closed(closed):
    command = f'{sys.executable} -c "$TEXT" {closed}>&-'
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, env={"TEXT": TEXT.format("pass", "")}
    )
    assert done.returncode == 0, done.stderr
