"""What can be read around a steady region of work: CPU time, clocks, throttling, energy.

A counter that cannot be read gives None, and `readable` gives the reason; nothing is estimated in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from pybatch.device import nvml
from pybatch.device.identity import usable_cores

FIGURES = (
    "sm_active",
    "sm_occupancy",
    "tensor_active",
    "dram_active",
    "cpu_active",
    "sm_clock_mhz",
    "throttled",
    "joules_per_sample",
)
_MIN_ENERGY_S = 5.0  # below this, the energy counter's update period (~100 ms) is more than 2 % of the window
_RAPL = Path("/sys/class/powercap")
_GPU_ONLY = "a GPU's counter; this run is on a CPU"
_GPM = "needs NVML GPM sampling, which this version does not read"


@dataclass(frozen=True)
class Reading:
    """What was read over a region; None where a counter could not be read."""

    seconds: float
    cpu_active: float | None = None  # share of the usable cores, 0..1
    sm_clock_mhz: float | None = None  # at the region's end
    throttled: bool | None = None
    joules: float | None = None


class Region:
    """Brackets a region of work: `start`, the work, `stop`. Regions of one batch size are added up by the caller."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cores = usable_cores()
        self._process = psutil.Process()
        self._gpu = nvml.handle(device) if device.type == "cuda" else None

    def start(self) -> None:
        """Begin a region."""
        self._energy = self._joules()
        self._cpu = self._cpu_seconds()
        self._began = time.perf_counter()

    def stop(self) -> Reading:
        """End it."""
        seconds = time.perf_counter() - self._began
        busy = self._cpu_seconds() - self._cpu
        energy = self._joules()
        joules = energy - self._energy if energy is not None and self._energy is not None else None
        if joules is not None and joules < 0:  # the counter wrapped around
            joules = None
        active = None
        if self.device.type == "cpu" and seconds > 0:
            active = min(1.0, busy / (seconds * self._cores))
        clock, throttled = self._clock()
        return Reading(seconds, active, clock, throttled, joules)

    def _cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def _joules(self) -> float | None:
        if self.device.type == "cpu":
            domains = _rapl_domains()
            return None if isinstance(domains, str) else sum(int(path.read_text()) for path in domains) / 1e6
        library: Any = nvml.library()
        if isinstance(self._gpu, str):
            return None
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3  # mJ
        except library.NVMLError:
            return None

    def _clock(self) -> tuple[float | None, bool | None]:
        library: Any = nvml.library()
        if self._gpu is None or isinstance(self._gpu, str):
            return None, None
        try:
            clock = float(library.nvmlDeviceGetClockInfo(self._gpu, library.NVML_CLOCK_SM))
        except library.NVMLError:
            clock = None
        try:
            reasons = int(library.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu))
        except library.NVMLError:
            return clock, None
        # Idle and settings of the user (application clocks) lower the clock without being a disturbance.
        harmless = library.nvmlClocksThrottleReasonGpuIdle | library.nvmlClocksThrottleReasonApplicationsClocksSetting
        return clock, bool(reasons & ~harmless)


class OtherLoad:
    """CPU time that other processes took since this object was made; they slow down what is timed meanwhile."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._began, self._before = time.perf_counter(), self._other_seconds()

    def cores(self) -> float | None:
        """Cores kept busy by others, on average; None where this process cannot use the whole machine.

        There the system's counters include cores that do not concern it.
        """
        if usable_cores() != psutil.cpu_count():
            return None
        seconds = time.perf_counter() - self._began
        return max(0.0, (self._other_seconds() - self._before) / seconds) if seconds > 0 else 0.0

    def _other_seconds(self) -> float:
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        every = machine.user + machine.system + getattr(machine, "nice", 0.0)
        return float(every - own.user - own.system)


def joules(readings: list[Reading]) -> float | None:
    """Energy over regions of one batch, J; None where unreadable or where they last less than 5 s together."""
    if sum(reading.seconds for reading in readings) < _MIN_ENERGY_S:
        return None
    values = [reading.joules for reading in readings]
    return sum(v for v in values if v is not None) if None not in values else None


def cpu_active(readings: list[Reading]) -> float | None:
    """Share of the usable cores kept busy over regions of one batch, 0..1; None where it was not read."""
    known = [(r.seconds, r.cpu_active) for r in readings if r.cpu_active is not None]
    seconds = sum(s for s, _ in known)
    return sum(s * share for s, share in known) / seconds if seconds > 0 else None


def readable(device: torch.device) -> dict[str, str | None]:
    """Every figure of a batch that comes from a counter: None when it can be read here, else why it cannot."""
    if device.type == "cpu":
        reasons: dict[str, str | None] = dict.fromkeys(FIGURES, _GPU_ONLY)
        domains = _rapl_domains()
        return reasons | {"cpu_active": None, "joules_per_sample": domains if isinstance(domains, str) else None}
    reasons = {**dict.fromkeys(FIGURES, _GPM), "cpu_active": "this run is on a GPU"}
    library: Any = nvml.library()
    gpu = nvml.handle(device)
    if isinstance(gpu, str):
        return reasons | dict.fromkeys(("sm_clock_mhz", "throttled", "joules_per_sample"), gpu)
    calls: dict[str, Callable[[], object]] = {
        "sm_clock_mhz": lambda: library.nvmlDeviceGetClockInfo(gpu, library.NVML_CLOCK_SM),
        "throttled": lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
        "joules_per_sample": lambda: library.nvmlDeviceGetTotalEnergyConsumption(gpu),
    }
    for figure, call in calls.items():
        try:
            call()
            reasons[figure] = None
        except library.NVMLError as error:
            reasons[figure] = f"NVML refuses: {error}"
    return reasons


def energy_reason(device: torch.device) -> str:
    """Why a batch has no energy figure."""
    reason = readable(device)["joules_per_sample"]
    return reason or f"the steady region is shorter than {_MIN_ENERGY_S:g} s, too short for the energy counter"


def _rapl_domains() -> list[Path] | str:
    """Energy counters of the CPU packages (RAPL), or the reason why there are none to read."""
    domains = sorted(_RAPL.glob("intel-rapl:?/energy_uj")) if _RAPL.is_dir() else []
    if not domains:
        return "no RAPL energy counter under /sys/class/powercap"
    try:
        for path in domains:
            int(path.read_text())
    except (OSError, ValueError) as error:
        return f"the RAPL energy counter cannot be read: {error}"
    return domains
