"""What disturbs from outside: told from the machine's own counters, against a process that takes the cores."""

import subprocess
import sys
import time

import pytest

from pybatch.device import disturbance
from pybatch.device.disturbance import Disturbance


def work(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ((None, None, None), []),
        ((0.0, 0.0, 0.0), []),
        ((0.19, 0.019, 0.049), []),
        ((1.5, 0.0, 0.0), ["other processes kept 1.5 of 2 cores busy"]),
        ((0.0, 0.03, 0.0), ["the hypervisor took 3% of the time"]),
        ((0.5, None, 0.31), ["kept 0.5 of 2 cores", "waited for a core 31% of the time"]),
    ],
)
def test_what_is_told(monkeypatch, figures, says):
    monkeypatch.setattr(disturbance, "usable_cores", lambda: 2)
    monkeypatch.setattr(Disturbance, "figures", lambda self: figures)
    told = Disturbance().told()
    assert len(told) == len(says)
    assert all(text in line for text, line in zip(says, told, strict=True))


def test_other_processes_are_seen_and_this_one_is_not():
    cores = disturbance.usable_cores()
    before = Disturbance()
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(2 * cores)]
    try:
        time.sleep(0.3)
        seen = Disturbance()
        work(0.5)
        taken, _, waited = seen.figures()
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert before.figures()[0] is None or before.figures()[0] > 0.3 * cores
    assert taken is None or taken > 0.4 * cores
    assert waited is None or waited > 0.2  # of three that want each core
