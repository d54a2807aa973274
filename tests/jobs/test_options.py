"""What a job was asked for reaches each of its parts, and no part asks for more."""

import dataclasses
from typing import Any

import pytest
import torch

from pybatch.jobs import bench, branch
from pybatch.jobs.options import BenchOptions, BranchOptions
from pybatch.records import Convergence, Run
from pybatch.workloads.running.finding import find

OPTIONS = BenchOptions(
    100.0, "bf16", (8, 16), thorough=True, seed=7, compile=True, graph=True, command="pybatch bench ..."
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, run: Run) -> dict[str, dict[str, Any]]:
    """What each measurement was called with, where ready records stand in for them."""
    found: dict[str, dict[str, Any]] = {}

    def stand_in(name: str, record: object) -> None:
        def measure(workload: object, **arguments: Any) -> object:
            found[name] = arguments
            return record

        monkeypatch.setattr(bench, name, measure)
        if hasattr(branch, name):
            monkeypatch.setattr(branch, name, measure)

    capacity = dataclasses.replace(run.capacity, max_batch=None) if run.capacity else None
    stand_in("measure_capacity", capacity)
    stand_in("measure_noise", run.noise)
    stand_in("measure_branches", Convergence(()))
    return found


def test_every_option_of_bench_reaches_its_part(asked: dict[str, dict[str, Any]]) -> None:
    record = bench.run_bench(find("digits"), OPTIONS, device="cpu")
    for arguments in asked.values():
        assert (arguments["device"], arguments["dtype"], arguments["seed"]) == (torch.device("cpu"), "bf16", 7)
    capacity = asked["measure_capacity"]
    assert (capacity["batches"], capacity["compile"], capacity["graph"]) == ((8, 16), True, True)
    assert capacity["time_budget"] == 40.0
    assert asked["measure_noise"]["time_budget"] == pytest.approx(25.0, rel=0.05)  # 0.15 of 0.6 of what is left
    branches = asked["measure_branches"]["time_budget"]  # all but a twentieth, which a closer look gets
    assert branches == pytest.approx(95.0, rel=0.02)
    assert record.environment is not None
    assert (record.environment.command, record.environment.seed) == ("pybatch bench ...", 7)
    assert record.complete


def test_what_was_not_asked_for_is_not_measured(asked: dict[str, dict[str, Any]]) -> None:
    bench.run_bench(find("digits"), dataclasses.replace(OPTIONS, thorough=False), device="cpu")
    assert list(asked) == ["measure_capacity", "measure_noise"]
    assert asked["measure_capacity"]["time_budget"] == 70.0


def test_options_of_branch_are_arguments_and_none_is_left_to_the_measurement(asked: dict[str, dict[str, Any]]) -> None:
    options = BranchOptions((50,), 10.0, lr=0.1, seed=3)
    record = branch.run_branches(find("digits"), options, device="cpu", command="typed")
    given = asked["measure_branches"]
    assert (given["checkpoints"], given["time_budget"], given["lr"], given["seed"]) == ((50,), 10.0, 0.1, 3)
    assert not {"factors", "rule", "folder", "base_batch"} & set(given)
    assert record.environment is not None
    assert (record.environment.command, record.environment.seed) == ("typed", 3)
