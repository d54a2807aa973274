"""What others wrote is read, never run; and nothing listens for other machines."""

import importlib.util
import os
import pickle

import pytest
import torch
from cases import hostile, sweeps

from pybatch.base.errors import UsageError
from pybatch.branch import checkpoint
from pybatch.capacity import distributed
from pybatch.commands.partial import PartialRecord
from pybatch.workloads.running import finding


@pytest.fixture
def no_code(monkeypatch):
    """User code, or code from a file, would run through one of these."""

    def fail(*_, **__):
        pytest.fail("code was run")

    for place in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, place, fail)
    monkeypatch.setattr(finding, "load_file", fail)
    monkeypatch.setattr(importlib.util, "spec_from_file_location", fail)


def test_reading_records_and_stores_runs_none_of_it(tmp_path, monkeypatch, request):
    store = tmp_path / "runs.db"
    sweeps.measure(store=store, batches=[4, 8], rates=[0.1, 0.2], seeds=1)
    record = tmp_path / "run.json"
    text = hostile.SOUND[0].replace('"command": "pybatch bench"', '"command": "pybatch bench --workload evil.py:Evil"')
    record.write_text(text)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    for ending in ("md", "csv", "txt"):  # all modules are imported
        hostile.typed("report", str(record), str(store), "-o", str(tmp_path / f"before.{ending}"))
    hostile.typed("compare", str(record), str(record))
    request.getfixturevalue("no_code")
    for ending in ("md", "csv", "txt"):
        assert hostile.typed("report", str(record), str(store), "-o", str(tmp_path / f"page.{ending}"))[0] == 0
    assert hostile.typed("compare", str(record), str(record))[0] == 0
    assert PartialRecord(record).earlier() is not None  # what --resume goes on with


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, save):
    path, mark = tmp_path / "step-1.pt", tmp_path / "mark"
    save({"format": checkpoint.FORMAT, "model": Evil(mark)}, path)
    with pytest.raises(UsageError, match=r"checkpoint '.*' is refused|is damaged or no checkpoint"):
        checkpoint.load(path)
    assert not mark.exists()


def test_gloo_of_one_machine_stays_on_it(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    met = []
    group = distributed.dist
    monkeypatch.setattr(group, "init_process_group", lambda *_, **__: met.append(os.environ.get("GLOO_SOCKET_IFNAME")))
    monkeypatch.setattr(group, "get_rank", lambda: 0)
    monkeypatch.setattr(group, "destroy_process_group", lambda: None)
    with distributed.process_group(torch.device("cpu")):
        assert os.environ["GLOO_SOCKET_IFNAME"] == distributed._loopback() == "lo"
    assert met == ["lo"]
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "4")  # of two machines
    with distributed._on_loopback():
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with distributed._on_loopback():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_ray_that_is_started_here_listens_here(monkeypatch):
    ray = pytest.importorskip("pybatch.processes.ray")
    asked = []

    class Ray:
        def init(self, **options):
            asked.append(options)
            if options.get("address"):
                raise ConnectionError

    made = object.__new__(ray.Cluster)
    made._ray = Ray()
    made._join("auto")
    assert asked[-1]["_node_ip_address"] == "127.0.0.1"
