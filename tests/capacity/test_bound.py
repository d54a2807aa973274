"""Bytes that a step moves, shares of the roofs, and what bounds a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import roofs  # type: ignore[import-not-found, unused-ignore]
import torch
from cases.planted import CPU, PlantedClock, Small, measure
from torch import nn

from pybatch.capacity import measurement
from pybatch.capacity.bound import NEAR, WAITING, Place, bound
from pybatch.capacity.flops import count_flops
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.traffic import Traffic, update_bytes
from pybatch.records import BatchPoint, Ceilings, ThroughputFit
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session

CACHE = 32 << 20


def moved(work: Callable[[], object]) -> int:
    with Traffic() as traffic:
        work()
    found: int = traffic.bytes
    return found


A, B = torch.randn(8, 16), torch.randn(16, 4)
ROW = torch.randn(16)
IDS = torch.tensor([3, 3, 0])


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda: A @ B, 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: A + 1.0, 2 * 8 * 16),
        (lambda: A.clone().mul_(2.0), (2 + 2) * 8 * 16),  # cloned, then read and written in place
        (lambda: torch.empty_like(A).copy_(A), 2 * 8 * 16),  # the copy's target is not read
        (lambda: torch.empty_like(A).fill_(1.0), 8 * 16),
        (lambda: torch.mm(A, B, out=torch.empty(8, 4)), 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: A.t().view(16, 2, 4).transpose(0, 1)[0].detach(), 0),  # views
        (lambda: ROW.expand(8, 16) + A, 16 + 2 * 8 * 16),  # an expanded row is read once
        (lambda: torch.cat([A, A]), 4 * 8 * 16),
    ],
)
def test_bytes_are_what_operators_read_and_write(work: Callable[[], object], numbers: int) -> None:
    assert moved(work) == 4 * numbers


def test_a_lookup_reads_the_rows_it_gives_not_the_whole_table() -> None:
    table = torch.randn(1000, 16)
    assert moved(lambda: nn.functional.embedding(IDS, table)) == 4 * 2 * 3 * 16 + 8 * 3


def test_an_adamw_update_moves_28_bytes_a_parameter() -> None:
    step = TrainingStep(Session(Small(), CPU))
    step.load(2)
    step()
    parameters = sum(p.numel() for p in step.session.parameters)
    assert update_bytes(step.session.parameters, step.optimizer.state) == 28 * parameters


# The benchmark's workloads: what a roof is compared with is counted exactly.


def counted(work: Workload, n: int) -> tuple[int | None, int, TrainingStep]:
    step = TrainingStep(Session(work, CPU))
    step.load(n)
    step()
    step.check()  # it knows now that nothing changes the batch, which is copied until then
    with Traffic() as traffic:
        flops, reason = count_flops(step)
    assert reason is None
    return flops, traffic.bytes, step


@pytest.mark.parametrize(("width", "depth", "n"), [(8, 1, 4), (16, 6, 32)])
def test_products_are_counted_as_three_per_layer_but_the_first_ones_input(width: int, depth: int, n: int) -> None:
    work = roofs.Products(width, depth)
    flops, _, _ = counted(work, n)
    assert flops == work.flops(n) == (3 * depth - 1) * 2 * n * width**2


def test_a_copy_is_counted_as_read_once_and_written_once() -> None:
    work = roofs.Copies(width=1024)
    flops, read_and_written, step = counted(work, 64)
    update = update_bytes(step.session.parameters, step.optimizer.state)
    assert flops == 0
    assert 0 <= read_and_written - work.bytes(64) < 100  # the loss of one number
    assert update == 28


# Ceilings of 1e9 FLOP/s and B/s make shares easy to read.
def test_shares_of_the_roofs_are_work_over_time_over_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e9, 2e9))
    work = roofs.Products(8, 2)
    found = measure(work, PlantedClock(1e-3, 1e-5), [4, 8, 16])
    for p in found.batches:
        assert p.step_ms is not None
        assert p.step_bytes is not None
        _, traffic, step = counted(work, p.batch)
        assert p.step_bytes == traffic + update_bytes(step.session.parameters, step.optimizer.state)
        assert p.mfu_measured == pytest.approx(work.flops(p.batch) / (p.step_ms / 1e3) / 1e9)
        assert p.mbu_measured == pytest.approx(p.step_bytes / (p.step_ms / 1e3) / 2e9)


# What bounds a batch.

GPU = Place("cuda", "bf16", CACHE)
HOST = Place("cpu", "fp32", CACHE)
LARGE = 8 * CACHE


def point(**figures: Any) -> BatchPoint:
    given: dict[str, Any] = {"batch": 64, "status": "ok", "step_ms": 10.0} | figures
    return BatchPoint(**given)


@pytest.mark.parametrize(
    ("place", "figures", "limit", "evidence"),
    [
        (GPU, {"host_bound": 0.7, "mfu_measured": 0.1}, "host", "70.0 %"),
        (GPU, {"host_bound": WAITING, "tensor_active": 0.9}, "host", "30.0 %"),
        (GPU, {"step_ms": 4.0, "eager_step_ms": 10.0, "launch_overhead_ms": 6.0, "host_bound": 0.0}, "launch", "60.0"),
        # Little is won by replaying: the launches are not it.
        (GPU, {"eager_step_ms": 10.5, "launch_overhead_ms": 0.5, "tensor_active": 0.8}, "tensor", "80.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.85, "tensor_active": 0.3}, "memory", "85.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.65, "tensor_active": 0.75}, "tensor", "75.0 %"),
        (GPU, {"host_bound": 0.1, "mfu_measured": 0.9}, "tensor", "90.0 %"),
        (Place("cuda", "fp32", CACHE), {"host_bound": 0.1, "mfu_measured": 0.9}, "compute", "90.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.85, "power_capped_share": 0.9}, "power", "90.0 % of the looks"),
        # Capped now and then, it is not what limits most of the steps; nor is it where no share was kept.
        (GPU, {"host_bound": 0.1, "dram_active": 0.85, "power_capped_share": 0.5}, "memory", "85.0 %"),
        (GPU, {"dram_active": 0.1, "power_capped_share": 0.2}, None, "lowered the clock at 20.0 %"),
        (GPU, {"dram_active": 0.85, "power_capped": True}, "memory", "85.0 %"),
        # Waiting for the host, a capped clock costs nothing.
        (GPU, {"host_bound": 0.8, "power_capped_share": 1.0}, "host", "80.0 %"),
        (GPU, {"host_bound": 0.1, "mbu_measured": 0.9, "memory_bytes": LARGE}, "memory", "90.0 %"),
        # A counter is believed before a count of bytes.
        (GPU, {"dram_active": 0.2, "mbu_measured": 0.9, "memory_bytes": LARGE}, None, "no limit is near"),
        (HOST, {"mfu_measured": 0.95, "mbu_measured": 0.1}, "compute", "95.0 %"),
        (HOST, {"mfu_measured": 0.05, "mbu_measured": 0.8, "memory_bytes": LARGE}, "memory", "80.0 %"),
        # The same bytes in a working set that caches hold say nothing of memory.
        (HOST, {"mfu_measured": 0.05, "mbu_measured": 0.8, "memory_bytes": CACHE}, None, "no limit is near"),
        # Past its roof by more than noise: it is the roof of other work, as of bf16 products on a CPU without them.
        (HOST, {"mfu_measured": 3.2, "mbu_measured": 0.1}, None, "no limit is near"),
        (HOST, {"mfu_measured": 1.1, "mbu_measured": 0.1}, "compute", "110 %"),
        (HOST, {"mfu_measured": NEAR - 0.01, "mbu_measured": 0.1}, None, "59.0 %"),
        (HOST, {}, None, "no roof"),
        (HOST, {"step_ms": None}, None, "not timed"),
    ],
)
def test_the_limit_follows_from_the_figures(
    place: Place, figures: dict[str, Any], limit: str | None, evidence: str
) -> None:
    found, why = bound(point(**figures), place)
    assert found == limit
    assert evidence in why


@pytest.mark.parametrize(("batch", "limit"), [(1, "host"), (100, "host"), (150, None), (10_000, None)])
def test_on_a_cpu_a_fixed_cost_far_from_every_roof_is_the_hosts(
    fit: ThroughputFit, batch: int, limit: str | None
) -> None:
    flat = dataclasses.replace(fit, alpha_s=1e-3, t0_s=1e-3, beta_s=1e-5)  # half of the step is fixed at batch 100
    low = {"batch": batch, "mfu_measured": 0.02, "mbu_measured": 0.05}
    assert bound(point(**low), HOST, flat)[0] == limit
    assert bound(point(**low, host_bound=0.1), GPU, flat)[0] is None  # a GPU's fixed part may be anything
    assert bound(point(batch=batch, mfu_measured=0.02), HOST, flat)[0] is None  # the bytes are not known
