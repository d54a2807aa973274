"""What disturbs from outside: told from the machine's own counters, against a process that takes the cores."""

import subprocess
import sys
import time
import types

import pytest
import torch

from pybatch.device import clock, disturbance
from pybatch.device.clock import WallClock
from pybatch.device.disturbance import Disturbance, threads_left, waited_s

CPU = torch.device("cpu")


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


class Shared:
    """A machine on which calls of a millisecond, but for every third, lose their core and wait nine times as long."""

    def __init__(self, monkeypatch, every=3):
        self.now = self.waited = 0.0
        self.calls, self.every = 0, every
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(clock, "waited_s", lambda: self.waited)

    def call(self):
        self.calls += 1
        self.now += 1e-3
        if self.calls % self.every:
            self.now += 9e-3
            self.waited += 9e-3


def test_calls_that_lose_their_core_are_left_out_where_others_keep_it(monkeypatch):
    machine, wall = Shared(monkeypatch), WallClock()
    assert wall.undisturbed(machine.call, 6) == pytest.approx([1e-3, 1e-3])  # seen together, and then one by one
    assert machine.calls == 12
    assert wall.undisturbed(machine.call, 6) == pytest.approx([1e-3, 1e-3])
    assert machine.calls == 18
    assert wall.left_out == 8 / 12
    assert len(wall.time(machine.call, 6)) == 6  # whoever counts calls gets all of them
    machine.every = 10**9
    assert wall.undisturbed(machine.call, 5) == pytest.approx([1e-2] * 5)  # none kept it: all count
    machine.every = 1
    assert wall.undisturbed(machine.call, 5) == pytest.approx([1e-3] * 5)
    looks = []
    monkeypatch.setattr(clock, "waited_s", lambda: looks.append(machine.calls) or 0.0)
    assert wall.undisturbed(machine.call, 5) == pytest.approx([1e-3] * 5)
    assert len(looks) == 2  # quiet again: not one for each call


def test_without_the_kernels_record_all_calls_count(monkeypatch):
    machine, wall = Shared(monkeypatch), WallClock()
    monkeypatch.setattr(clock, "waited_s", lambda: None)
    assert len(wall.undisturbed(machine.call, 6)) == 6


def test_waits_are_counted_for_all_threads(monkeypatch, tmp_path):
    for name, text in (("1", "5000000000 2000000000 7"), ("2", "1000000000 500000000 3"), ("3", "not a record")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    monkeypatch.setattr(disturbance, "_TASKS", tmp_path)
    assert waited_s() == 2.5
    monkeypatch.setattr(disturbance, "_TASKS", tmp_path / "none")
    assert waited_s() is None


def test_a_wake_up_of_each_of_many_threads_is_no_lost_core(monkeypatch):
    """0.8 us each, of 64 threads, in a call of 1 ms: 5 % of it together."""
    machine, wall = Shared(monkeypatch, every=1), WallClock()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(clock, "waited_s", lambda: machine.calls * 64 * 0.8e-6)
    assert len(wall.undisturbed(machine.call, 6)) == 6
    assert (wall.left_out, machine.calls) == (0.0, 6)


@pytest.fixture
def busy(monkeypatch):
    """Other processes keep so many of eight cores busy; torch has eight threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(disturbance, "usable_cores", lambda: 8)
    monkeypatch.setattr(disturbance.psutil, "cpu_count", lambda: 8)
    idle = types.SimpleNamespace(user=0.0, system=0.0, nice=0.0, steal=0.0)
    monkeypatch.setattr(disturbance.psutil, "cpu_times", lambda: idle)
    monkeypatch.setattr(disturbance, "_LOOK_S", 0.0)

    def keep(*cores):
        looks = iter(cores)
        last = cores[-1]
        monkeypatch.setattr(Disturbance, "figures", lambda self: (next(looks, last), None, None))

    yield keep
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "left"), [(None, 8), (0.4, 8), (0.6, 7), (2.9, 5), (7.0, 1), (30.0, 1)])
def test_no_more_threads_than_cores_are_left(busy, cores, left):
    busy(cores)
    with threads_left(CPU) as said:
        assert torch.get_num_threads() == left
        assert (said is None) == (left == 8)
        with threads_left(CPU) as again:  # a part of a whole: no other look, the same words
            assert (torch.get_num_threads(), again) == (left, said)
        if said:
            assert said == f"other processes kept {cores} of 8 cores busy, so that {left} of 8 threads were used"
    assert torch.get_num_threads() == 8


def test_what_passes_counts_for_nothing_and_more_threads_than_cores_are_the_users(busy, monkeypatch):
    busy(3.0, 0.1)
    with threads_left(CPU) as said:
        assert (torch.get_num_threads(), said) == (8, None)
    busy(0.2)
    monkeypatch.setattr(disturbance, "usable_cores", lambda: 2)  # a quota of a container, say
    with threads_left(CPU) as said:
        assert (torch.get_num_threads(), said) == (8, None)


def test_a_run_that_goes_on_takes_the_threads_that_it_had(busy):
    busy(6.0)
    with threads_left(CPU, 5) as said:
        assert (torch.get_num_threads(), said) == (5, "5 of 8 threads were used, as in the run that goes on")
    with threads_left(CPU, 8) as said:
        assert (torch.get_num_threads(), said) == (8, None)


def test_threads_that_were_asked_for_stay(busy, monkeypatch):
    busy(6.0)
    with threads_left(torch.device("cuda")) as said:
        assert (torch.get_num_threads(), said) == (8, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with threads_left(CPU) as said:
        assert (torch.get_num_threads(), said) == (8, None)
