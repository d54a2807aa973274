"""Energy per example: planted power behind a counter that is updated now and then and lags."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import simulated_nvml
from cases.planted import CPU, NoMemory, PlantedClock, Small

from pybatch.capacity import energy, measurement
from pybatch.capacity.energy import WINDOW_S, EnergyWindows, in_order, needed_s
from pybatch.device import counters_nvml, nvml
from pybatch.records import BatchPoint, Capacity, Ceilings

IDLE = 60.0  # watts
SimulatedNvml: Any = simulated_nvml.SimulatedNvml
BATCHES = [8, 64, 256, 1024]


def watts(n: int) -> float:
    return 100.0 + 0.5 * n


class PoweredClock(PlantedClock):
    """Lets a simulated GPU draw power that depends on the batch size as long as steps take, and idle in between."""

    def __init__(self, library: Any, alpha: float = 2e-3, beta: float = 1e-5) -> None:
        super().__init__(alpha, beta)
        self.library = library

    def time(self, work: Any, count: int) -> list[float]:
        found = super().time(work, count)
        self.library.work(sum(found), watts=watts(self.batch()))
        return found

    def rest(self, seconds: float) -> None:
        super().rest(seconds)
        self.library.work(seconds, watts=IDLE)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures the small workload on a planted device whose energy counter is of such a library."""
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e9, 2e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))

    def measure(library: Any, budget: float) -> Capacity:
        monkeypatch.setattr(nvml, "library", lambda: library)
        clock = PoweredClock(library)
        run = measurement._Measurement(Small(), CPU, "fp32", BATCHES, budget, 0, clock)
        clock.batch = lambda: run.explorer.step.batch_size
        run.explorer.memory = NoMemory()  # type: ignore[assignment]
        run.region.meter = counters_nvml.Nvml(torch.device("cuda", 0))
        run.region.counters[0] = run.region.meter
        run.measure(False)
        assert clock.now() <= budget
        return run.found.capacity()

    return measure


def true_joules(point: BatchPoint) -> float:
    assert point.step_ms is not None
    return watts(point.batch) * point.step_ms / 1e3 / point.batch


@pytest.mark.parametrize(("update_s", "lag_s"), [(0.1, 0.1), (0.02, 0.3), (0.1, 0.0)])
def test_the_planted_power_is_found_behind_a_counter_that_lags(measured: Any, update_s: float, lag_s: float) -> None:
    found = measured(SimulatedNvml(update_s=update_s, lag_s=lag_s), budget=100.0)
    for point in found.batches:
        assert point.joules_per_sample == pytest.approx(true_joules(point), rel=0.03)
        assert point.energy_window_s >= WINDOW_S
    assert not [note for note in found.notes if note.figure == "batches.joules_per_sample"]


def test_the_same_counter_misleads_windows_that_are_short_or_begin_cold(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the length and the steps before a window are for: without either of them the test above would fail."""
    for change in ({"WINDOW_S": 0.25, "_CHUNK_S": 0.25}, {"_LEAD_S": 0.0}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(energy, name, value)
            found = measured(SimulatedNvml(update_s=0.1, lag_s=0.3), budget=100.0)
        errors = [abs(point.joules_per_sample / true_joules(point) - 1) for point in found.batches]
        assert max(errors) > 0.03, change


def test_a_short_budget_reads_the_batch_sizes_that_matter_and_says_why_not_the_others(measured: Any) -> None:
    found = measured(SimulatedNvml(update_s=0.1, lag_s=0.1), budget=20.0)
    known = [point for point in found.batches if point.joules_per_sample is not None]
    assert 1 <= len(known) < len(BATCHES)
    assert known[-1].batch == 1024  # saturates best of these
    assert known[-1].joules_per_sample == pytest.approx(true_joules(known[-1]), rel=0.03)
    [note] = [note for note in found.notes if note.figure == "batches.joules_per_sample"]
    assert "no room for a window of 5 s" in note.text


def test_no_time_is_set_aside_for_a_counter_that_cannot_be_read(measured: Any) -> None:
    library = SimulatedNvml(refused=["nvmlDeviceGetTotalEnergyConsumption"])
    found = measured(library, budget=100.0)
    assert all(point.joules_per_sample is point.energy_window_s is None for point in found.batches)
    [note] = [note for note in found.notes if note.figure == "batches.joules_per_sample"]
    assert "no permission" in note.text


def test_a_counter_lost_in_mid_run_keeps_what_was_read() -> None:
    class Meter:
        reasons: dict[str, str] = {}  # noqa: RUF012

        def start(self) -> None: ...

        def stop(self, seconds: float) -> dict[str, float]:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                self.reasons = {"joules": "NVML refuses"}
                return {}
            return {"joules": 10.0 * seconds}

    clock = PlantedClock(1e-3, 0.0)
    steps = {1: 1e-3, 2: 1e-3, 4: 1e-3}
    windows = EnergyWindows(lambda n: None, lambda: None, clock, Meter())
    found = windows.measure(steps, deadline=1e3)
    assert list(found) == [4]
    assert found[4].joules == pytest.approx(10.0 * found[4].seconds)
    assert windows.reserve_s(steps, 1e3) == 0.0


def test_a_step_that_fails_costs_its_own_window_alone() -> None:
    def load(n: int) -> None:
        if n == 4:
            raise torch.OutOfMemoryError("out of memory")

    meter: Any = SimpleNamespace(reasons={}, start=lambda: None, stop=lambda seconds: {"joules": 1.0})
    found = EnergyWindows(load, lambda: None, PlantedClock(1e-3, 0.0), meter).measure({1: 1e-3, 4: 1e-3}, 1e3)
    assert list(found) == [1]


def test_the_order_begins_where_throughput_saturates() -> None:
    steps = {n: 1e-3 * max(1.0, n / 64) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    assert in_order(steps) == [64, 256, 1, 8, 128, 32, 16, 4, 2]
    assert in_order({}) == []


@pytest.mark.parametrize("step_s", [1e-4, 3e-3, 0.2, 1.7, 9.0])
def test_a_window_needs_what_it_takes(step_s: float) -> None:
    clock = PlantedClock(step_s, 0.0)
    meter: Any = SimpleNamespace(reasons={}, start=lambda: None, stop=lambda seconds: {"joules": 1.0})
    [found] = EnergyWindows(lambda n: None, lambda: None, clock, meter).measure({1: step_s}, math.inf).values()
    assert clock.now() == pytest.approx(needed_s(step_s), rel=0.1)
    assert found.seconds >= WINDOW_S
    assert found.steps * step_s == pytest.approx(found.seconds, rel=0.02)
