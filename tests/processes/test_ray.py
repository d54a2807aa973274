"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost on the way."""

import socket
import sqlite3
import sys
import warnings

import pytest

from pybatch.base.errors import UsageError
from pybatch.sweep.measurement import measure_convergence
from pybatch.workloads.running.finding import find

ARGUMENTS = {
    "batches": [16, 64],
    "seeds": 2,
    "rates": [0.2, 0.4, 0.8],
    "target": {"train": 1.0},
    "max_steps": 150,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Not above: every worker collects this file, and one runs it."""
    global ray, Cluster
    ray = pytest.importorskip("ray")
    pytest.importorskip("cloudpickle")  # the workload below is defined in a test
    from pybatch.processes.ray import Cluster


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster as Nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def rows(path):
    db = sqlite3.connect(path)
    keys = [key for (key,) in db.execute("SELECT key FROM trial")]
    db.close()
    return keys


@pytest.mark.filterwarnings("ignore")
def test_a_sweep_survives_the_loss_of_a_node(cluster, tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    lost = cluster.add_node(num_cpus=1)
    deliver, outcomes = Cluster.deliver, []

    def deliver_and_kill(self, submission, outcome):
        deliver(self, submission, outcome)
        outcomes.append(outcome.trial.key)
        if len(outcomes) == 1:  # mid-task: the rest of its trials is lost with the node
            cluster.add_node(num_cpus=1)
            cluster.remove_node(lost, allow_graceful=False)

    monkeypatch.setattr(Cluster, "deliver", deliver_and_kill)
    found = measure_convergence(find("digits"), store=path, ray="auto", **ARGUMENTS)
    assert found.complete
    assert len(rows(path)) == len(set(rows(path))) == found.trials
    alone = measure_convergence(find("digits"), **ARGUMENTS)
    for a, b in zip(alone.curves[0].points, found.curves[0].points, strict=True):
        assert b.steps == pytest.approx(a.steps, rel=0.02)


@pytest.fixture
def listening():
    """The address of a port that accepts connections and is no cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def join(monkeypatch, address, error):
    """Start a sweep at an address at which Ray raises this error."""

    def init(**_):
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    measure_convergence(find("digits"), ray=address, **ARGUMENTS)


@pytest.mark.parametrize("error", [ConnectionError("nobody there"), RuntimeError("timed out"), ValueError("what")])
def test_an_address_without_a_cluster_is_refused(monkeypatch, listening, error):
    with pytest.raises(UsageError, match=rf"--ray '{listening}': no cluster answers there \({error}\)"):
        join(monkeypatch, listening, error)


def test_another_version_is_named_as_the_cause(monkeypatch, listening):
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0\n    Python: 3.8")
    with pytest.raises(UsageError, match=r"runs other versions .*Ray: 1.0 Python: 3.8.*Install the same"):
        join(monkeypatch, listening, error)


def test_an_address_at_which_nothing_listens_is_refused_at_once(monkeypatch):
    """Ray would try for minutes: it is not asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UsageError, match=rf"--ray '127.0.0.1:{port}': no cluster answers there \(Connection refused"):
        join(monkeypatch, f"127.0.0.1:{port}", AssertionError("Ray was asked"))


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:0", "head:99999", "head:port"])
def test_what_is_no_address_is_refused(monkeypatch, address):
    with pytest.raises(UsageError, match=rf"--ray '{address}' is no address. Give HOST:PORT"):
        join(monkeypatch, address, AssertionError("Ray was asked"))


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--ray needs Ray, which is not installed. Run: pip install 'pybatch\[ray\]'"):
        measure_convergence(find("digits"), ray="auto", **ARGUMENTS)
