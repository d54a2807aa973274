"""Capacity end to end: planted step times and memory come back, and every way a batch can fail has its status."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases.patience import with_time
from torch import nn

from pybatch.base.errors import Interrupted, UsageError, WorkloadError
from pybatch.capacity import measurement
from pybatch.capacity.exploration import OUT_OF_TIME, Explorer, ladder
from pybatch.capacity.measurement import measure_capacity
from pybatch.capacity.summary import counter_notes
from pybatch.device.clock import Clock
from pybatch.records import BatchPoint, Capacity, Ceilings, Run, to_dict
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")
GEMM = 1e9


class Linear(Workload):
    """A linear regression; `refuse` raises for batch sizes a test wants refused."""

    name = "linear"

    def __init__(self, refuse: Callable[[int], BaseException | None] = lambda n: None) -> None:
        self.refuse = refuse

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, 4, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        error = self.refuse(len(batch))
        if error is not None:
            raise error
        loss: torch.Tensor = model(batch).square().mean()
        return loss


class PlantedClock(Clock):
    """Runs the work once for its errors, and reports alpha + beta n seconds a step on a clock of its own."""

    def __init__(self, alpha: float = 2e-3, beta: float = 1e-5) -> None:
        self.alpha, self.beta, self.time_s = alpha, beta, 0.0
        self.rng = np.random.default_rng(0)
        self.explorer: Explorer | None = None

    def time(self, work: Callable[[], object], count: int) -> list[float]:
        work()
        assert self.explorer is not None
        base = self.alpha + self.beta * self.explorer.step.batch_size
        times = [float(base * np.exp(self.rng.normal(0, 0.01))) for _ in range(count)]
        self.time_s += sum(times)
        return times

    def now(self) -> float:
        return self.time_s

    def rest(self, seconds: float) -> None:
        self.time_s += seconds


class PlantedMemory:
    """Peak memory of 1 MB + 10 kB per example."""

    reason: str | None = None

    def __init__(self) -> None:
        self.explorer: Explorer | None = None

    def start(self) -> None: ...

    def rebase(self, held_bytes: int) -> None: ...

    def peak(self) -> int:
        assert self.explorer is not None
        return 1_000_000 + 10_000 * self.explorer.step.batch_size


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(GEMM, 1e9))


def measure(
    work: Workload,
    batches: Sequence[int] | None = None,
    *,
    budget: float = 100.0,
    limit: int = 1 << 40,
    clock: PlantedClock | None = None,
    on_point: Callable[[BatchPoint], None] | None = None,
) -> Capacity:
    """A whole measurement on a planted device."""
    clock = clock or PlantedClock()
    run = measurement._Measurement(work, CPU, "fp32", batches, budget, 0, clock, None, on_point)
    memory = PlantedMemory()
    clock.explorer = memory.explorer = run.explorer
    run.explorer.memory = memory  # type: ignore[assignment]
    run.explorer.memory_limit = limit
    run.measure(False)
    return run.found.capacity()


def by_batch(capacity: Capacity) -> dict[int, BatchPoint]:
    return {p.batch: p for p in capacity.batches}


def notes(capacity: Capacity, figure: str) -> str:
    return " | ".join(note.text for note in capacity.notes if note.figure == figure)


def test_planted_step_times_come_back() -> None:
    clock = PlantedClock(alpha=2e-3, beta=1e-5)
    seen: list[BatchPoint] = []
    found = measure(Linear(), clock=clock, on_point=seen.append)
    assert found.complete
    assert found.model is not None
    assert found.half_batch == pytest.approx(200, rel=0.05)
    assert found.ceiling_samples_per_s == pytest.approx(1e5, rel=0.03)
    assert found.saturation_low is not None
    assert found.saturation_high is not None
    assert found.saturation_low <= 9.5 * 200 <= found.saturation_high
    assert found.saturation_measured == 4096  # n / (n + 200) passes 95 % at 3800
    # From 1 on; the doublings to 8192 and to 16384 gain 2.4 % and 1.2 %, to 32768 0.6 %.
    assert [p.batch for p in found.batches] == [2**i for i in range(16)]
    assert "less than 2%" in notes(found, "batches")
    for p in found.batches:
        truth = 1e3 * (clock.alpha + clock.beta * p.batch)
        assert p.status == "ok"
        assert p.step_ms == pytest.approx(truth, rel=0.02)
        assert p.step_ms_low is not None
        assert p.step_ms_high is not None
        assert p.step_ms_low <= p.step_ms <= p.step_ms_high
        assert p.samples_per_s == pytest.approx(1e3 * p.batch / p.step_ms)
        assert p.model_flops == 2 * 2 * 4 * p.batch  # no gradient of the input is needed
        assert p.mfu_measured == pytest.approx(p.model_flops / (p.step_ms / 1e3) / GEMM)
        assert p.memory_bytes == 1_000_000 + 10_000 * p.batch
        assert p.samples >= 10
    assert sorted(p.batch for p in seen) == [p.batch for p in found.batches]
    bare = {p.batch: dataclasses.replace(p, bound_by=None, bound_why=None) for p in found.batches}  # the fit's part
    assert all(bare[p.batch] == p for p in seen)


class OverflowingClock(PlantedClock):
    """Past 1000 examples every one costs twice as much, as where a cache overflows."""

    def time(self, work: Callable[[], object], count: int) -> list[float]:
        assert self.explorer is not None
        return [t * (1 + (self.explorer.step.batch_size > 1000)) for t in super().time(work, count)]


def test_batches_past_a_fall_in_throughput_do_not_bend_the_fit() -> None:
    found = measure(Linear(), [1, 8, 64, 512, 1000, 2000, 4000], clock=OverflowingClock())
    assert found.model is not None
    assert found.model.batches == 5
    assert found.half_batch == pytest.approx(200, rel=0.1)
    assert found.ceiling_samples_per_s == pytest.approx(1e5, rel=0.05)
    assert any("falls by over 10% past batch 1000" in note.text for note in found.notes)
    assert [p.batch for p in found.batches] == [1, 8, 64, 512, 1000, 2000, 4000]


def test_a_slow_model_is_measured_at_enough_batches_for_a_fit() -> None:
    """Steps of 2 s in 50 s: three sizes and a fit, where ten samples of each would leave room for one."""
    found = measure(Linear(), budget=50.0, clock=PlantedClock(alpha=2.0, beta=1e-3))
    assert found.model is not None
    assert len([p for p in found.batches if p.status == "ok"]) >= 3


def test_given_batches_are_the_ones_recorded() -> None:
    found = measure(Linear(), [512, 64, 8])
    assert [p.batch for p in found.batches] == [8, 64, 512]
    assert found.half_batch == pytest.approx(200, rel=0.05)
    assert "not saturated" in notes(found, "capacity.saturation_batch")
    assert "no measured batch reaches 95%" in notes(found, "capacity.saturation_measured")


def test_two_batches_are_measured_but_not_fitted() -> None:
    found = measure(Linear(), [1, 2])
    assert [p.status for p in found.batches] == ["ok", "ok"]
    assert found.model is None
    assert found.ceiling_samples_per_s is None
    assert "a fit needs 3" in notes(found, "capacity.model")


def test_between_distant_batches_memory_is_learnt_on_the_way() -> None:
    assert list(ladder([1000, 4])) == [4, 32, 256, 1000]
    found = measure(Linear(), [4, 1000, 1_000_000], limit=100_000_000)
    points = by_batch(found)
    assert points[1000].status == "ok"
    assert points[1_000_000].status == "predicted_oom"
    assert "GiB" in (points[1_000_000].reason or "")
    assert set(points) == {4, 1000, 1_000_000}


def test_doubling_ends_where_memory_would() -> None:
    found = measure(Linear(), limit=5_000_000, clock=PlantedClock(alpha=1.0, beta=1e-5))
    assert found.batches[-1].batch == 512
    assert found.batches[-1].status == "predicted_oom"
    assert "batch 512 does not fit" in notes(found, "batches")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_is_a_status(error: BaseException) -> None:
    found = measure(Linear(lambda n: error if n > 100 else None), [1, 8, 64, 128, 256])
    assert [p.status for p in found.batches] == ["ok", "ok", "ok", "oom", "oom"]
    assert found.complete
    assert found.model is not None
    assert found.model.batches == 3


class Normalized(Linear):
    """Batch normalization refuses a single example."""

    name = "normalized"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_a_batch_the_model_refuses_is_skipped_with_the_reason() -> None:
    found = measure(Normalized(), [1, 2, 4, 8])
    assert [p.status for p in found.batches] == ["skipped", "ok", "ok", "ok"]
    assert "Normalized.loss()" in (found.batches[0].reason or "")
    assert not found.complete
    assert notes(found, "batches.status") == "the workload refuses batch 1; each one's reason says how"


def test_a_smallest_batch_that_was_not_asked_for_leaves_nothing_out() -> None:
    found = measure(Normalized())
    assert [p.status for p in found.batches[:3]] == ["skipped", "ok", "ok"]
    assert found.complete


def test_a_batch_in_the_middle_or_at_the_end_that_the_workload_refuses_leaves_the_run_incomplete() -> None:
    found = measure(Linear(lambda n: ValueError("no") if n in (16, 64) else None))
    assert {p.batch for p in found.batches if p.status == "skipped"} == {16, 64}
    assert not found.complete
    assert notes(found, "batches.status") == "the workload refuses batch 16, 64; each one's reason says how"


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda m, b: m(b).mean() * float("nan"), "returned nan"),
        (lambda m, b: m(b).square(), "not one number"),
        (lambda m, b: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_workload_that_fails_at_every_batch_is_an_error_naming_its_method(loss: Any, complaint: str) -> None:
    work = Linear()
    work.loss = loss  # type: ignore[method-assign]
    with pytest.raises(WorkloadError, match=rf"Linear\.loss\(\) of workload 'linear' .*{complaint}"):
        measure_capacity(work, device="cpu", find_max_batch=False)


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError(), "oom"), (ValueError("worn out"), "skipped")], ids=["memory", "workload"]
)
def test_a_batch_that_fails_only_later_keeps_the_others(error: Exception, status: str) -> None:
    calls = 0

    def later(n: int) -> Exception | None:
        nonlocal calls
        calls += n == 64
        return error if n == 64 and calls > 8 else None

    found = measure(Linear(later), [1, 8, 64, 512])
    points = by_batch(found)
    assert points[64].status == status
    assert points[64].step_ms is None
    assert [points[n].status for n in (1, 8, 512)] == ["ok"] * 3
    assert found.model is not None


def test_a_step_that_takes_too_long_is_skipped_and_the_record_says_incomplete() -> None:
    found = measure(Linear(), [1, 8, 64, 512, 4096], budget=10.0, clock=PlantedClock(alpha=1e-3, beta=2e-3))
    points = by_batch(found)
    assert points[1].status == "ok"
    assert points[4096].status == "skipped"
    assert "too long for the time budget" in (points[4096].reason or "")
    assert not found.complete


def test_a_budget_too_short_for_anything_still_gives_a_record() -> None:
    found = measure(Linear(), [1, 2, 4, 8], budget=0.05, clock=PlantedClock(alpha=0.01))
    assert not found.complete
    assert {p.status for p in found.batches} <= {"ok", "skipped"}
    assert any(p.reason for p in found.batches)
    assert found.model is None or found.model.batches >= 3


def test_the_budget_is_kept_on_the_planted_clock() -> None:
    clock = PlantedClock(alpha=0.05, beta=1e-4)
    measure(Linear(), [2**i for i in range(10)], budget=20.0, clock=clock)
    assert clock.now() < 20.5


def test_what_the_budget_left_untimed_is_said() -> None:
    clock = PlantedClock(alpha=0.1, beta=0.0)
    found = measure(Linear(), [1, 2, 4, 8, 16], budget=7.0, clock=clock)
    untimed = [p for p in found.batches if p.reason == OUT_OF_TIME]
    assert untimed or "the time budget ended before these were steady" in notes(found, "batches.step_ms")
    assert found.complete == (not untimed)


def test_sizes_that_all_refuse_lead_to_one_that_runs() -> None:
    """Doubling from 1 never meets a multiple of 3; without a size that runs nothing bounds the memory of the next."""

    class Threes(Linear):
        reference_batch = 3

    found = measure(Threes(lambda n: ValueError("groups of three") if n % 3 else None), budget=20.0)
    ran = [p.batch for p in found.batches if p.status == "ok"]
    assert ran[:4] == [3, 6, 12, 24]
    assert {p.batch for p in found.batches if p.status == "skipped"} == {1, 2}
    assert found.complete
    assert found.model is not None


def test_a_model_that_never_fits_is_said_in_words() -> None:
    refuse = Linear(lambda n: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB"))
    with pytest.raises(
        WorkloadError, match=r"'linear' at batch 1 does not fit in memory \(OutOfMemoryError.*smaller model"
    ):
        measure(refuse, [8])


def test_a_largest_batch_that_was_asked_for_is_not_said_to_be_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement._Measurement, "_explore", lambda self: None)  # no time for any
    texts = {
        asked: notes(
            measure_capacity(Linear(), device="cpu", time_budget=1.0, find_max_batch=asked), "capacity.max_batch"
        )
        for asked in (True, False)
    }
    assert texts == {True: "no batch size ran, so that nothing is known of memory", False: "not asked for"}


def test_a_figure_without_flops_is_not_put_down_to_the_datasheet() -> None:
    region: Any = SimpleNamespace(device=torch.device("cuda", 0), reasons={}, origins={})
    explorer: Any = SimpleNamespace(
        step=SimpleNamespace(compiled=False),
        memory=SimpleNamespace(reason=None),
        flops_reason="no FLOP formula for aten._cudnn_rnn",
    )
    point = BatchPoint(8, "ok", step_ms=1.0)
    for peak, says in ((989e12, "no FLOP formula"), (None, "not in the table")):
        found = counter_notes(region, [point], Ceilings(7e14, 4e12, peak), explorer)
        assert says in next(note.text for note in found if note.figure == "batches.mfu_datasheet")


def test_ctrl_c_carries_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def stop(point: BatchPoint) -> None:
        done.append(point.batch)
        if len(done) == 3:
            raise KeyboardInterrupt

    clock = PlantedClock()
    monkeypatch.setattr(measurement, "clock_for", lambda device: clock)
    create = measurement._Measurement.__init__

    def planted(self: Any, *arguments: Any) -> None:
        create(self, *arguments)
        clock.explorer = self.explorer

    monkeypatch.setattr(measurement._Measurement, "__init__", planted)
    with pytest.raises(Interrupted) as caught:
        measure_capacity(Linear(), device="cpu", batches=[1, 8, 64, 512], on_point=stop)
    partial = caught.value.partial
    assert isinstance(partial, Capacity)
    assert not partial.complete
    points = by_batch(partial)
    assert all(points[n].status == "ok" for n in done)
    assert all(p.reason == "interrupted before it was timed" for p in partial.batches if p.status == "skipped")
    assert partial.model is not None  # three batches are enough for a fit
    assert "interrupted" in notes(partial, "capacity")
    assert partial.workload is not None


@pytest.mark.parametrize(("arguments", "value"), [({"batches": [0, 2]}, r"\[0, 2\]"), ({"time_budget": 0.0}, "0.0")])
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], value: str) -> None:
    with pytest.raises(UsageError, match=value):
        measure_capacity(Linear(), device="cpu", **arguments)


def test_a_real_run_fills_the_record_and_gives_a_reason_for_every_null() -> None:
    told: list[float] = []

    def measured(budget: float) -> Capacity:
        told.clear()
        return measure_capacity(
            find("digits"),
            device="cpu",
            batches=[1, 16, 256, 1024],
            time_budget=budget,
            progress=lambda text, share: told.append(share),
            find_max_batch=False,
        )

    found = with_time(measured, lambda found: all(p.status == "ok" for p in found.batches), 15.0)
    assert [p.batch for p in found.batches if p.status == "ok"] == [1, 16, 256, 1024]
    assert found.ceilings is not None
    assert found.ceilings.gemm_flops is not None
    assert found.workload is not None
    assert found.workload.parameters == 4810
    assert told == sorted(told)
    reasons = {note.figure for note in found.notes}
    for field in dataclasses.fields(BatchPoint):
        values = [getattr(p, field.name) for p in found.batches]
        if field.name != "reason" and all(value is None for value in values):
            assert f"batches.{field.name}" in reasons
    for p in found.batches:
        # The MLP: 64-64-10, the first layer without a gradient of its input.
        assert p.model_flops == p.batch * (2 * 2 * 64 * 64 + 3 * 2 * 64 * 10)
        assert p.mfu_measured is not None
        assert 0 < p.mfu_measured < 1.1
        assert p.cpu_active is not None
        assert 0 < p.cpu_active <= 1
    assert found.max_batch is None
    assert "capacity.max_batch" in reasons
    again = Run.from_json(
        json.dumps({"schema": "pybatch/1", "created": "", "environment": _ENVIRONMENT} | _json(found))
    )
    assert again.capacity == found


_ENVIRONMENT = dict.fromkeys(("torch", "commit", "driver", "cuda")) | {
    "python": "",
    "platform": "",
    "pybatch": "",
    "threads": 1,
    "seed": 0,
    "command": "",
}


def _json(capacity: Capacity) -> dict[str, Any]:
    top = {name: to_dict(getattr(capacity, name)) for name in ("device", "ceilings", "workload", "batches")}
    return top | {"capacity": to_dict(capacity)}
