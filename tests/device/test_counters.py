"""Counters: real ones of this CPU, and a simulated GPU that plays every failure. A null always has a reason."""

import gc
import time
from types import SimpleNamespace

import pytest
import torch
from cases.simulated_nvml import SimulatedNvml

from pybatch.device import counters, counters_cpu, counters_nvml, nvml

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPM = ("sm_active", "sm_occupancy", "tensor_active", "dram_active")
OTHERS = ("sm_clock_mhz", "throttled", "joules_per_sample")


@pytest.fixture
def plug(monkeypatch):
    """Puts a simulated library in NVML's place, with a GPU of a known UUID, and lets time pass as it says."""

    def use(library):
        monkeypatch.setattr(nvml, "library", lambda: library)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
        if not isinstance(library, str):
            monkeypatch.setattr(counters.time, "perf_counter", lambda: library.time)
        return library

    return use


def read(region, library, seconds=0.5, **work):
    region.start()
    library.work(seconds, **work)
    return region.stop()


def test_a_region_reads_cpu_time_and_nothing_of_a_gpu():
    region = counters.Region(CPU)
    region.start()
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    busy = region.stop()
    region.start()
    time.sleep(0.2)
    idle = region.stop()
    assert idle.cpu_active < busy.cpu_active <= 1
    assert busy.sm_clock_mhz is busy.throttled is busy.sm_active is None
    assert idle.cpu_active < counters.mean([busy, idle], "cpu_active") < busy.cpu_active


def test_means_are_weighted_by_time_and_pass_over_what_is_unknown():
    readings = [counters.Reading(1.0, sm_active=0.2), counters.Reading(3.0, sm_active=0.6), counters.Reading(9.0)]
    assert counters.mean(readings, "sm_active") == pytest.approx(0.5)
    assert counters.mean(readings, "tensor_active") is None


def test_every_counter_figure_is_readable_or_has_a_reason():
    found = counters.readable(counters.Region(CPU))
    assert set(found) == set(counters.FIGURES)
    assert found["cpu_active"] is None
    assert all(found[figure] for figure in counters.GPU_FIGURES)


def test_rapl_energy_is_read_in_joules(monkeypatch, tmp_path):
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    (domain / "energy_uj").write_text("1000000\n")
    monkeypatch.setattr(counters_cpu, "RAPL_FOLDER", tmp_path)
    assert counters.readable(counters.Region(CPU))["joules_per_sample"] is None
    region = counters.Region(CPU)
    region.start()
    (domain / "energy_uj").write_text("3500000\n")
    assert region.stop().joules == pytest.approx(2.5)
    region.start()
    (domain / "energy_uj").write_text("10\n")  # wrapped around
    assert region.stop().joules is None
    region.start()
    (domain / "energy_uj").unlink()  # lost in mid-run
    assert region.stop().joules is None
    assert "cannot be read" in region.reasons["joules_per_sample"]


def test_a_gpu_is_asked_by_uuid_and_read_over_the_region(plug):
    library = plug(SimulatedNvml(throttle=1 | 2))
    region = counters.Region(GPU)
    assert region.reasons == {"cpu_active": "a run on a GPU"}
    library.work(5.0, sm=10.0, watts=90.0)  # before the region: must not count
    reading = read(region, library, 0.5)
    assert set(library.asked) == {"GPU-ab-cd"}
    assert (reading.sm_active, reading.sm_occupancy) == pytest.approx((0.9, 0.5))
    assert (reading.tensor_active, reading.dram_active) == pytest.approx((0.7, 0.4))
    assert reading.joules == pytest.approx(250.0)
    assert (reading.sm_clock_mhz, reading.throttled) == (1980.0, 0.0)  # idle and the user's settings do not count


def test_throttling_is_told(plug):
    library = plug(SimulatedNvml(throttle=8))
    assert read(counters.Region(GPU), library).throttled == 1.0
    assert read(counters.Region(GPU), library).power_capped == 0.0  # slowed by something else
    library.throttle = 4
    assert read(counters.Region(GPU), library).power_capped == 1.0


def test_what_lowers_the_clock_is_looked_at_all_along(plug):
    library = plug(SimulatedNvml())
    region = counters.Region(GPU)
    region.start()
    for throttle, clock in ((4, 1200), (4, 1300), (8, 1500)):
        library.throttle, library.clock = throttle, clock
        library.work(0.1)
        region.look()
    library.throttle, library.clock = 0, 2000  # at the end alone there is nothing to see
    reading = region.stop()
    assert (reading.throttled, reading.power_capped, reading.sm_clock_mhz) == (0.75, 0.5, 1500)
    assert read(region, library).throttled == 0  # the looks of the region before do not count


def test_a_region_too_short_for_gpm_gives_no_shares(plug):
    library = plug(SimulatedNvml())
    reading = read(counters.Region(GPU), library, 0.05)
    assert reading.sm_active is None
    assert reading.joules == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("library", "lost", "cause"),
    [
        ("nvidia-ml-py is not installed", (*GPM, *OTHERS), "not installed"),
        (SimulatedNvml(refused=["nvmlDeviceGetHandleByUUID"]), (*GPM, *OTHERS), "no permission"),
        (SimulatedNvml(gpm=False), GPM, "came with Hopper"),
        (SimulatedNvml(refused=["nvmlGpmQueryDeviceSupport"]), GPM, "no permission"),
        (SimulatedNvml(refused=["nvmlDeviceGetTotalEnergyConsumption"]), ("joules_per_sample",), "no permission"),
    ],
)
def test_what_is_not_there_from_the_start_has_a_reason(plug, library, lost, cause):
    plug(library)
    region = counters.Region(GPU)
    if isinstance(library, str):
        region.start()
        reading = region.stop()
    else:
        reading = read(region, library)
    for figure in (*GPM, *OTHERS):
        value = getattr(reading, figure.replace("joules_per_sample", "joules"))
        assert (value is None) == (figure in lost)
        assert (figure in region.reasons) == (figure in lost)
        if figure in lost:
            assert cause in region.reasons[figure]


@pytest.mark.parametrize("call", ["nvmlGpmSampleGet", "nvmlGpmMetricsGet"])
def test_a_permission_lost_in_mid_run_costs_only_what_follows(plug, call):
    library = plug(SimulatedNvml())
    region = counters.Region(GPU)
    before = read(region, library)
    library.refused.add(call)
    after = [read(region, library) for _ in range(3)]
    assert before.sm_active == pytest.approx(0.9)
    assert all(reading.sm_active is None and reading.sm_clock_mhz == 1980.0 for reading in after)
    assert all("no permission" in region.reasons[figure] for figure in GPM)


def test_a_metric_with_its_own_error_code_costs_itself_alone(plug):
    library = plug(SimulatedNvml(metric_codes={5: 3}))
    region = counters.Region(GPU)
    for _ in range(2):  # asked for once more without it
        reading = read(region, library)
        assert reading.tensor_active is None
        assert reading.dram_active == pytest.approx(0.4)
    assert region.reasons["tensor_active"].endswith("code 3")


def test_samples_are_freed(plug):
    library = plug(SimulatedNvml())
    region = counters.Region(GPU)
    read(region, library)
    assert library.allocated == 2
    del region
    gc.collect()
    assert library.allocated == 0


def test_the_real_library_has_every_name_that_is_used():
    pynvml = pytest.importorskip("pynvml")
    for name in counters_nvml._GPM_METRICS.values():
        assert getattr(SimulatedNvml, name) == getattr(pynvml, name)
    for name in vars(SimulatedNvml):
        if name.startswith(("nvml", "NVML", "c_nvml")):
            assert hasattr(pynvml, name), name
    query = pynvml.c_nvmlGpmMetricsGet_t()
    assert all(hasattr(query, name) for name in ("version", "numMetrics", "sample1", "sample2"))
    assert all(hasattr(query.metrics[0], name) for name in ("metricId", "nvmlReturn", "value"))
