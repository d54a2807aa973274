"""A stand-in for `pynvml` that plays a GPU and each of its failures. Only what pybatch calls."""

import math
from types import SimpleNamespace

import numpy as np


class SimulatedError(Exception):
    """NVML's refusal."""


class SimulatedNvml:
    """One GPU whose counters advance with `work`.

    Args:
        gpm: whether this GPU has GPM.
        refused: names of calls that raise, from the start; more may be added in mid-run.
        metric_codes: GPM metrics with a return code of their own, by id.
        throttle: the throttle reasons' bits.
        update_s: period at which the energy counter is brought up to date.
        lag_s: how long the device's work takes to be seen in it.
    """

    NVMLError = SimulatedError
    NVML_SUCCESS = 0
    NVML_CLOCK_SM = 1
    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_SM_OCCUPANCY = 3
    NVML_GPM_METRIC_ANY_TENSOR_UTIL = 5
    NVML_GPM_METRIC_DRAM_BW_UTIL = 10
    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonApplicationsClocksSetting = 2
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, gpm=True, refused=(), metric_codes=None, throttle=0, update_s=0.0, lag_s=0.0):
        self.gpm, self.refused, self.metric_codes, self.throttle = gpm, set(refused), metric_codes or {}, throttle
        self.update_s, self.lag_s = update_s, lag_s
        self.time, self.clock = 0.0, 1980
        self.energy = [(0.0, 0.0)]  # seconds, millijoules: straight lines between
        self.integrals = dict.fromkeys((2, 3, 5, 10), 0.0)  # percent x seconds, by metric
        self.asked, self.allocated = [], 0

    def work(self, seconds, sm=90.0, occupancy=50.0, tensor=70.0, dram=40.0, watts=500.0):
        """Let the device work for a while at these percentages."""
        self.time += seconds
        self.energy.append((self.time, self.energy[-1][1] + 1e3 * watts * seconds))
        for metric, percent in zip(self.integrals, (sm, occupancy, tensor, dram), strict=True):
            self.integrals[metric] += percent * seconds

    def _refuse(self, name):
        if name in self.refused:
            raise SimulatedError("no permission")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        self._refuse("nvmlDeviceGetHandleByUUID")
        return self  # any object that is no string

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        self._refuse("nvmlDeviceGetClockInfo")
        return self.clock

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        self._refuse("nvmlDeviceGetCurrentClocksThrottleReasons")
        return self.throttle

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        self._refuse("nvmlDeviceGetTotalEnergyConsumption")
        seen = self.time - self.lag_s
        if self.update_s:
            seen = math.floor(seen / self.update_s) * self.update_s
        return int(np.interp(seen, *zip(*self.energy, strict=True)))

    def nvmlGpmQueryDeviceSupport(self, gpu):
        self._refuse("nvmlGpmQueryDeviceSupport")
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self):
        self.allocated += 1
        return SimpleNamespace(time=None, integrals=None)

    def nvmlGpmSampleFree(self, sample):
        self.allocated -= 1

    def nvmlGpmSampleGet(self, gpu, sample):
        self._refuse("nvmlGpmSampleGet")
        sample.time, sample.integrals = self.time, dict(self.integrals)

    def c_nvmlGpmMetricsGet_t(self):
        metrics = [SimpleNamespace(metricId=None, nvmlReturn=None, value=None) for _ in range(98)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=metrics)

    def nvmlGpmMetricsGet(self, query):
        self._refuse("nvmlGpmMetricsGet")
        assert query.version == self.NVML_GPM_METRICS_GET_VERSION
        seconds = query.sample2.time - query.sample1.time
        for slot in query.metrics[: query.numMetrics]:
            slot.nvmlReturn = self.metric_codes.get(slot.metricId, self.NVML_SUCCESS)
            if slot.nvmlReturn == self.NVML_SUCCESS:
                gained = query.sample2.integrals[slot.metricId] - query.sample1.integrals[slot.metricId]
                slot.value = gained / seconds
            else:
                slot.value = 12345.0  # must not be read
