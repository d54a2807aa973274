"""An NVIDIA GPU's counters through NVML: clock, throttling and energy, and GPM's utilization on Hopper and later.

`nvmlDeviceGetUtilizationRates` is not used: it says that some kernel ran, not how much of the device it used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from statistics import fmean
from typing import Any, cast

import torch

from pybatch.device import nvml

_MIN_GPM_S = 0.1  # GPM's samples are further apart than this, or its counters may not have advanced
_GPM_METRICS = {  # our figure: NVML's metric, in percent
    "sm_active": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor_active": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_active": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}


class Nvml:
    """Clock and throttling over the looks taken in a region and at its end; energy over it."""

    def __init__(self, device: torch.device) -> None:
        self.reasons: dict[str, str] = {}
        self._library = cast(Any, nvml.library())
        self._gpu = nvml.handle(device)
        if isinstance(self._gpu, str):
            self.reasons = dict.fromkeys(("sm_clock_mhz", "throttled", "power_capped", "joules"), self._gpu)
        self._energy = self._joules()
        self._looks: list[dict[str, float]] = []
        self._now()

    def start(self) -> None:
        """Begin a region."""
        self._energy, self._looks = self._joules(), []

    def look(self) -> None:
        """Look at the clock and what lowers it now."""
        self._looks.append(self._now())

    def stop(self, seconds: float) -> dict[str, float]:
        """Energy over the region; the clock's mean, and the shares of the looks at which it was lowered."""
        energy, before = self._joules(), self._energy
        self.look()
        figures = {figure for seen in self._looks for figure in seen}
        found = {figure: fmean(seen[figure] for seen in self._looks if figure in seen) for figure in figures}
        if energy is not None and before is not None and energy >= before:  # else the counter wrapped around
            found["joules"] = energy - before
        return found

    def _joules(self) -> float | None:
        millijoules = self._ask("joules", lambda: self._library.nvmlDeviceGetTotalEnergyConsumption(self._gpu))
        return None if millijoules is None else millijoules / 1e3

    def _now(self) -> dict[str, float]:
        library, found = self._library, {}
        clock = self._ask("sm_clock_mhz", lambda: library.nvmlDeviceGetClockInfo(self._gpu, library.NVML_CLOCK_SM))
        if clock is not None:
            found["sm_clock_mhz"] = clock
        causes = self._ask("throttled", lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu))
        if causes is not None:
            # Idle and settings of the user (application clocks) lower the clock without being a disturbance.
            harmless = (
                library.nvmlClocksThrottleReasonGpuIdle | library.nvmlClocksThrottleReasonApplicationsClocksSetting
            )
            found["throttled"] = float(bool(int(causes) & ~harmless))
            power = library.nvmlClocksThrottleReasonSwPowerCap | library.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
            found["power_capped"] = float(bool(int(causes) & power))
        elif "throttled" in self.reasons:
            self.reasons.setdefault("power_capped", self.reasons["throttled"])
        return found

    def _ask(self, figure: str, call: Callable[[], Any]) -> float | None:
        if figure in self.reasons:
            return None
        try:
            return float(call())
        except self._library.NVMLError as error:
            self.reasons[figure] = f"NVML refuses: {error}"
            return None


class Gpm:
    """GPU performance monitoring: shares of SMs, tensor cores and DRAM over a region, from a sample at each end."""

    name = "NVML GPM"
    figures = tuple(_GPM_METRICS)

    def __init__(self, device: torch.device) -> None:
        self.reasons: dict[str, str] = {}
        self._library = cast(Any, nvml.library())
        self._gpu: Any = nvml.handle(device)
        self._samples: list[Any] = []
        self._began = False
        if isinstance(self._gpu, str):
            self._fail(self._gpu)
            return
        if not hasattr(self._library, "nvmlGpmMetricsGet"):
            self._fail("this nvidia-ml-py has no GPM. Install nvidia-ml-py 12 or later")
            return
        try:
            if not self._library.nvmlGpmQueryDeviceSupport(self._gpu).isSupportedDevice:
                self._fail("NVML GPM is not supported by this GPU: it came with Hopper")
                return
            for _ in range(2):
                self._samples.append(self._library.nvmlGpmSampleAlloc())
        except self._library.NVMLError as error:
            self._fail(f"NVML GPM refuses: {error}")
        finally:
            weakref.finalize(self, _free, self._library, self._samples)

    def start(self) -> None:
        """Take the sample at the region's begin."""
        self._began = not self.reasons.keys() >= _GPM_METRICS.keys() and self._sample(0)

    def stop(self, seconds: float) -> dict[str, float]:
        """The shares between the two samples; nothing for a region too short to tell."""
        if not self._began or seconds < _MIN_GPM_S or not self._sample(1):
            return {}
        library = self._library
        wanted = [figure for figure in _GPM_METRICS if figure not in self.reasons]
        query = library.c_nvmlGpmMetricsGet_t()
        query.version, query.numMetrics = library.NVML_GPM_METRICS_GET_VERSION, len(wanted)
        query.sample1, query.sample2 = self._samples
        for slot, figure in zip(query.metrics, wanted, strict=False):
            slot.metricId = getattr(library, _GPM_METRICS[figure])
        try:
            library.nvmlGpmMetricsGet(query)
        except library.NVMLError as error:
            self._fail(f"NVML GPM refuses: {error}")
            return {}
        found = {}
        for slot, figure in zip(query.metrics, wanted, strict=False):
            if slot.nvmlReturn == library.NVML_SUCCESS:
                found[figure] = float(slot.value) / 100.0
            else:  # each metric has a return code of its own
                self.reasons[figure] = f"NVML GPM gives no {_GPM_METRICS[figure]}: code {slot.nvmlReturn}"
        return found

    def _sample(self, index: int) -> bool:
        try:
            self._library.nvmlGpmSampleGet(self._gpu, self._samples[index])
        except self._library.NVMLError as error:
            self._fail(f"NVML GPM refuses: {error}")
            return False
        return True

    def _fail(self, why: str) -> None:
        self.reasons |= {figure: why for figure in _GPM_METRICS if figure not in self.reasons}


def _free(library: Any, samples: list[Any]) -> None:
    for sample in samples:
        library.nvmlGpmSampleFree(sample)
