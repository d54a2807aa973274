"""The protocol between a process and those it starts."""

import os
import queue
import subprocess
import sys
import time

import psutil
import pytest

from pybatch.capacity import probe
from pybatch.processes.child import Channel, Child


def doubled(channel: Channel) -> None:
    """Work of a child: answers twice what it is asked, and prints beside it."""
    while True:
        asked = channel.receive()
        print("a workload prints")
        os.system("echo and so do its children")
        channel.send(2 * asked)


def ends(channel: Channel) -> None:
    """Work that ends after one message, with its status."""
    os._exit(channel.receive())


def silent(channel: Channel) -> None:
    """Work that never answers."""
    time.sleep(60)


def forks(channel: Channel) -> None:
    """Work that leaves a process of its own behind, which holds the answers open."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    channel.send("done")


def garbles(channel: Channel) -> None:
    """Work that writes what is no answer."""
    channel._answers.write(b"cmodule_that_is_not\nthere\n.")
    channel._answers.flush()
    time.sleep(60)


def starts(channel: Channel) -> None:
    """Work that starts a stuck child of its own, and tells who that is."""
    channel.send(Child(silent).process.pid)
    time.sleep(60)


@pytest.fixture
def child():
    started = []

    def start(work, **streams):
        started.append(Child(work, **streams))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_answers_come_in_order_and_prints_go_elsewhere(child, capfd):
    worker = child(doubled)
    for asked in (1, [2], "3"):
        worker.send(asked)
    assert [worker.answers.get(timeout=30) for _ in range(3)] == [(worker, 2), (worker, [2, 2]), (worker, "33")]
    assert capfd.readouterr().out == ""


def test_a_child_that_ends_says_so_with_its_status(child):
    worker = child(ends)
    worker.send(7)
    assert worker.answers.get(timeout=30) == (worker, None)
    assert worker.status() == 7


def test_complaints_go_where_they_are_wanted(child, tmp_path):
    with (tmp_path / "complaints").open("w+b") as file:
        worker = child(doubled, stderr=file)
        worker.send(1)
        worker.answers.get(timeout=30)
        worker.send(None)  # twice nothing: the work raises
        assert worker.answers.get(timeout=30) == (worker, None)
        assert worker.status() == 1
    text = (tmp_path / "complaints").read_text()
    assert "and so do its children" in text
    assert "TypeError" in text


def test_one_that_never_answers_is_stopped(child):
    worker = child(silent)
    with pytest.raises(queue.Empty):
        worker.answers.get(timeout=0.05)
    worker.stop()
    assert worker.process.returncode == -9


def test_what_a_child_has_started_ends_with_it(child):
    worker = child(forks)
    assert worker.answers.get(timeout=30) == (worker, "done")
    begin = time.monotonic()
    worker.stop()
    assert time.monotonic() - begin < 5
    assert not worker._reader.is_alive()


def test_what_is_no_answer_ends_the_answers(child):
    worker = child(garbles)
    assert worker.answers.get(timeout=30) == (worker, None)


def test_a_child_ends_with_a_parent_that_was_killed(child):
    """Whatever it does then: this one sleeps."""
    worker = child(starts)
    _, pid = worker.answers.get(timeout=30)
    assert psutil.pid_exists(pid)
    worker.process.kill()
    worker.process.wait()
    gone = time.monotonic() + 5
    while psutil.pid_exists(pid) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(60)\ndef work(channel): pass\n"
DRIVER = """
import sys, time
sys.path[:0] = {paths!r}
from pybatch.processes.child import Child
if {importing}:
    import types
    slow = types.ModuleType("slow")
    def work(channel): pass
    work.__module__, work.__qualname__, slow.work = "slow", "work", work
    sys.modules["slow"] = slow  # this process has it; the child imports the one that takes long
else:
    from test_child import silent as work
children = [Child(work) for _ in range(3)]
print(*(child.process.pid for child in children), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("importing", [False, True], ids=["stuck", "importing"])
def test_workers_of_a_driver_that_was_killed_are_gone_within_5_s(tmp_path, importing):
    (tmp_path / "slow.py").write_text(SLOW)
    paths = [str(tmp_path), os.path.dirname(__file__)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = DRIVER.format(paths=paths, importing=importing)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        time.sleep(1.5 if importing else 0.5)  # in the middle of it
        assert all(map(psutil.pid_exists, pids))
        driver.kill()
    gone = time.monotonic() + 5
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
def test_workers_that_have_hardly_begun_are_gone_too(tmp_path, after):
    code = DRIVER.format(paths=[os.path.dirname(__file__)], importing=False)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        time.sleep(after)
        driver.kill()
    gone = time.monotonic() + 5
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


def test_a_probe_that_does_not_read_is_stopped_in_time(monkeypatch):
    monkeypatch.setattr(probe, "work", silent)
    begin = time.monotonic()
    assert probe.run_probe(b"x" * 10_000_000, 3.0).status == "timeout"
    assert time.monotonic() - begin < 10
