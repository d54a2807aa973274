"""Sweeps on a Ray cluster of two nodes on this machine, one of which is lost on the way."""

import sqlite3
import warnings

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("cloudpickle")  # the workload below is defined in a test

from pybatch.convergence.ray import Cluster  # noqa: E402
from pybatch.convergence.sweep import measure_convergence  # noqa: E402
from pybatch.errors import UsageError  # noqa: E402
from pybatch.workloads.finding import find  # noqa: E402

ARGUMENTS = {
    "batches": [16, 64],
    "seeds": 2,
    "rates": [0.2, 0.4, 0.8],
    "target": {"train": 1.0},
    "max_steps": 150,
    "device": "cpu",
}


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

    def deliver_and_kill(self, ticket, outcome):
        deliver(self, ticket, outcome)
        outcomes.append(outcome.trial.key)
        if len(outcomes) == 1:  # mid-unit: the rest of its trials is lost with the node
            cluster.add_node(num_cpus=1)
            cluster.remove_node(lost, allow_graceful=False)

    monkeypatch.setattr(Cluster, "deliver", deliver_and_kill)
    found = measure_convergence(find("digits"), store=path, ray="auto", **ARGUMENTS)
    assert found.complete
    assert len(rows(path)) == len(set(rows(path))) == found.trials
    alone = measure_convergence(find("digits"), **ARGUMENTS)
    for a, b in zip(alone.curves[0].points, found.curves[0].points, strict=True):
        assert b.steps == pytest.approx(a.steps, rel=0.02)


@pytest.mark.filterwarnings("ignore")
def test_an_address_without_a_cluster_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**_):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"--ray '10\.0\.0\.1:6379': no cluster answers there"):
        measure_convergence(find("digits"), ray="10.0.0.1:6379", **ARGUMENTS)
