"""Which source of a GPU's utilization is used, CUPTI's sampling and Kineto's estimate, and how each of them fails."""

import importlib
import inspect
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from cases.simulated_cupti import ALL, CuptiError, SimulatedCupti
from cases.simulated_nvml import SimulatedNvml

from pybatch.commands import doctor
from pybatch.device import counters, counters_cupti, counters_kineto, nvml

GPU = torch.device("cuda", 0)
SHARES = ("sm_active", "sm_occupancy", "tensor_active", "dram_active")
OLD = "it came with Hopper"


@pytest.fixture
def plug(monkeypatch):
    """A GPU of before Hopper, with a simulated CUPTI or the reason for none, and a trace or an error for Kineto's."""

    def use(cupti="cupti-python is not installed", trace=None, gpm=False):
        library = SimulatedNvml(gpm=gpm)
        monkeypatch.setattr(nvml, "library", lambda: library)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd"))
        monkeypatch.setattr(counters.time, "perf_counter", lambda: library.time)
        monkeypatch.setattr(counters_cupti, "_library", lambda: cupti)
        if trace is not None:

            def traced(work, count, device):
                for _ in range(count):
                    work()
                if isinstance(trace, Exception):
                    raise trace
                return trace * count

            activities = {torch.profiler.ProfilerActivity.CUDA}
            monkeypatch.setattr(torch.profiler, "supported_activities", lambda: activities)
            monkeypatch.setattr(counters_kineto, "trace", traced)
        return library

    return use


def read(region, library, seconds=0.5, work=lambda: None, step_s=1e-3):
    region.start()
    library.work(seconds)
    return region.estimated(region.stop(), work, step_s)


def shares(reading):
    return [getattr(reading, figure) for figure in SHARES]


# The order


def test_gpm_comes_first_and_nothing_else_is_touched(plug):
    cupti = SimulatedCupti()
    library = plug(cupti, gpm=True)
    region = counters.Region(GPU)
    assert shares(read(region, library)) == pytest.approx([0.9, 0.5, 0.7, 0.4])
    assert (cupti.calls, region.origins) == ([], {})
    assert region.source.name == "NVML GPM"


def test_before_hopper_cupti_samples_and_the_record_can_say_why(plug):
    cupti = SimulatedCupti()
    library = plug(cupti)
    region = counters.Region(torch.device("cuda", 3))
    reading = read(region, library)
    assert shares(reading) == pytest.approx([0.8, 0.4, 0.6, 0.35])
    assert reading.sm_clock_mhz == 1980.0  # the other counters are read beside it
    assert cupti.devices == [3]
    assert region.reasons == {"cpu_active": "a run on a GPU"}
    assert set(region.origins) == set(SHARES)
    assert "read by CUPTI PM sampling" in region.origins["sm_active"]
    assert OLD in region.origins["sm_active"]


def test_without_both_kineto_estimates(plug):
    kernels = [kernel(400.0, blocks=4.0, occupancy=50.0), kernel(200.0, blocks=0.5, occupancy=25.0), {"cat": "cpu_op"}]
    library = plug(trace=kernels)
    region = counters.Region(GPU)
    steps = []
    reading = read(region, library, 6.0, work=lambda: steps.append(1), step_s=1e-3)
    assert len(steps) == 5
    assert reading.sm_active == pytest.approx((400 * 1.0 + 200 * 0.5) / 1000)
    assert reading.sm_occupancy == pytest.approx((400 * 0.5 + 200 * 0.25) / 1000)
    assert reading.tensor_active is reading.dram_active is None
    assert reading.joules == pytest.approx(3000.0)  # of the region, not of the steps traced
    assert set(region.origins) == {"sm_active", "sm_occupancy"}
    assert "estimated" in region.origins["sm_active"]
    assert all(part in region.origins["sm_active"] for part in (OLD, "cupti-python is not installed"))
    assert all(part in region.reasons["tensor_active"] for part in (OLD, "not installed", "trace of kernels"))


def test_with_none_of_them_every_cause_is_told(plug):
    library = plug()
    region = counters.Region(GPU)
    assert shares(read(region, library)) == [None] * 4
    assert region.source is None
    for figure in SHARES:
        assert OLD in region.reasons[figure]
        assert "cupti-python is not installed" in region.reasons[figure]
        assert "Kineto: " in region.reasons[figure]


def test_doctor_names_the_source_and_why_not_a_better_one(plug):
    plug(SimulatedCupti())
    rows = doctor._counters(GPU)
    assert rows[0] == ("utilization by", "CUPTI PM sampling")
    lines = [": ".join(row) for row in rows]  # figures that share a reason share a line
    assert any("dram_active" in line and OLD in line for line in lines)
    assert any("joules_per_sample" in line and line.endswith("readable") for line in lines)
    plug()
    assert dict(doctor._counters(GPU))["utilization by"] == "nothing"


# CUPTI


def sampled(plug, **simulation):
    library = plug(SimulatedCupti(**simulation))
    region = counters.Region(GPU)
    return region, read(region, library)


def test_samples_count_by_their_length(plug):
    metrics = ALL | {"sm__cycles_active": [10.0, 90.0]}
    _, reading = sampled(plug, metrics=metrics, lengths=(3_000_000, 1_000_000))
    assert reading.sm_active == pytest.approx(0.3)


def test_a_chip_that_samples_by_cycles_only(plug):
    region, reading = sampled(plug, timed=False)
    assert reading.sm_active == pytest.approx(0.8)
    assert region.reasons == {"cpu_active": "a run on a GPU"}


@pytest.mark.parametrize("missing", ["sm__pipe_tensor_cycles_active", "dram__write_throughput", "sm__cycles_active"])
def test_a_missing_metric_costs_its_figure_alone(plug, missing):
    region, reading = sampled(plug, metrics={name: value for name, value in ALL.items() if name != missing})
    lost = {"sm__p": "tensor_active", "dram_": "dram_active", "sm__c": "sm_active"}[missing[:5]]
    for figure, value in zip(SHARES, (0.8, 0.4, 0.6, 0.35), strict=True):
        assert getattr(reading, figure) == (None if figure == lost else pytest.approx(value))
    assert OLD in region.reasons[lost]
    assert "is invalid or not supported" in region.reasons[lost]


def test_a_metric_of_another_name_stands_in(plug):
    metrics = {name.replace("dram__", "dramc__"): value for name, value in ALL.items()}
    region, reading = sampled(plug, metrics=metrics)
    assert reading.dram_active == pytest.approx(0.35)
    assert "dram_active" not in region.reasons


def test_what_does_not_fit_in_one_pass_is_left_out(plug):
    region, reading = sampled(plug, together=4)
    assert shares(reading) == [pytest.approx(0.8), pytest.approx(0.4), pytest.approx(0.6), None]
    assert "single pass" in region.reasons["dram_active"]


@pytest.mark.parametrize("error", [PermissionError("Insufficient privileges"), CuptiError("999"), RuntimeError("busy")])
def test_a_refusal_at_the_start_is_a_reason(plug, error):
    region, reading = sampled(plug, refused={"enable": error})
    assert shares(reading) == [None] * 4
    assert all(str(error) in region.reasons[figure] for figure in SHARES)


@pytest.mark.parametrize(
    ("call", "error"),
    [("start", CuptiError("lost")), ("stop", CuptiError("lost")), ("decode", MemoryError("Record overflow"))],
)
def test_a_refusal_in_mid_run_costs_only_what_follows(plug, call, error):
    cupti = SimulatedCupti()
    library = plug(cupti)
    region = counters.Region(GPU)
    assert read(region, library).sm_active == pytest.approx(0.8)
    cupti.refused[call] = error
    for _ in range(2):
        reading = read(region, library)
        assert shares(reading) == [None] * 4
        assert reading.sm_clock_mhz == 1980.0
    assert all(str(error) in region.reasons[figure] for figure in SHARES)


def test_a_region_too_short_for_a_sample_gives_nothing_and_blames_nobody(plug):
    region, reading = sampled(plug, lengths=())
    assert shares(reading) == [None] * 4
    assert "sm_active" not in region.reasons


def no_version(name):
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "error", "says"),
    [
        (no_version, None, "cupti-python is not installed"),
        (lambda name: "12.6.0", ModuleNotFoundError("no", name="cupti.pm_sampling"), "12.6.0 has no PM sampling"),
        (lambda name: "13.4.0", ModuleNotFoundError("no cuda", name="cuda"), "13.4.0 does not load: no cuda"),
        (lambda name: "13.4.0", OSError("libcupti.so.13: cannot open"), "does not load: OSError: libcupti.so.13"),
    ],
)
def test_a_library_that_cannot_be_used_is_named_with_its_version(monkeypatch, version, error, says):
    def load(name):
        raise error

    monkeypatch.setattr(counters_cupti.metadata, "version", version)
    monkeypatch.setattr(counters_cupti.importlib, "import_module", load)
    assert says in counters_cupti._library()


def test_the_real_library_takes_these_calls():
    module = pytest.importorskip("cupti.pm_sampling", exc_type=ImportError)
    parameters = inspect.signature(module.Collector.configure).parameters
    assert {"metrics", "hardware_buffer_size", "sampling_interval", "trigger_mode"} <= set(parameters)
    assert all(hasattr(module.Collector, name) for name in ("enable", "start", "stop", "decode"))
    assert {"start_timestamp", "end_timestamp", "metric_values"} <= set(module.Sample.__dataclass_fields__)
    assert hasattr(module.TriggerMode, "GPU_TIME_INTERVAL")
    assert hasattr(module.TriggerMode, "GPU_SYSCLK_INTERVAL")


# Kineto


def kernel(microseconds, blocks, occupancy):
    arguments = {"blocks per SM": blocks, "est. achieved occupancy %": occupancy}
    return {"cat": "kernel", "dur": microseconds, "args": {k: v for k, v in arguments.items() if v is not None}}


def test_kernels_side_by_side_do_not_pass_one(plug):
    library = plug(trace=[kernel(900.0, 2.0, 100.0)] * 2)
    assert read(counters.Region(GPU), library).sm_active == 1.0


def test_long_steps_are_traced_once(plug):
    steps = []
    library = plug(trace=[kernel(900.0, 2.0, 100.0)])
    read(counters.Region(GPU), library, work=lambda: steps.append(1), step_s=2.0)
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("trace", "lost", "says"),
    [
        ([], ("sm_active", "sm_occupancy"), "holds no kernel"),
        (RuntimeError("Kineto is already running\nmore"), ("sm_active", "sm_occupancy"), "Kineto is already running"),
        ([kernel(100.0, 1.0, None)], ("sm_occupancy",), "lacks a kernel's launch shape"),
        ([kernel(100.0, 1.0, -1)], ("sm_occupancy",), "lacks a kernel's launch shape"),
    ],
)
def test_a_trace_that_tells_nothing_gives_a_reason(plug, trace, lost, says):
    library = plug(trace=trace)
    region = counters.Region(GPU)
    for _ in range(2):
        reading = read(region, library)
    for figure in ("sm_active", "sm_occupancy"):
        assert (getattr(reading, figure) is None) == (figure in lost)
        assert (says in region.reasons.get(figure, "")) == (figure in lost)


def test_the_real_profiler_writes_the_trace_that_is_read():
    events = counters_kineto.trace(lambda: torch.ones(64) @ torch.ones(64), 2, torch.device("cpu"))
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    assert operators
    assert all(event["dur"] >= 0 and isinstance(event["args"], dict) for event in operators)


def test_no_source_reads_the_rate_at_which_some_kernel_ran():
    for module in (counters, counters_cupti, counters_kineto, importlib.import_module("pybatch.device.counters_nvml")):
        assert "nvmlDeviceGetUtilizationRates(" not in inspect.getsource(sys.modules[module.__name__])
