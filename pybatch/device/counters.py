"""What can be read around a steady region of work, behind one small protocol.

A counter that cannot be read gives None and a reason, also where it fails only in mid-run. A GPU's utilization is read
by the first of NVML GPM, CUPTI PM sampling and Kineto that can at the start of a run; it is not changed within one, as
their figures differ. What Kineto gives is an estimate, and is called one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pybatch.device.counters_cpu import CpuTime, Rapl
from pybatch.device.counters_cupti import PmSampling
from pybatch.device.counters_kineto import Kineto
from pybatch.device.counters_nvml import Gpm, Nvml

GPU_FIGURES = ("sm_active", "sm_occupancy", "tensor_active", "dram_active", "sm_clock_mhz", "throttled", "power_capped")
FIGURES = (*GPU_FIGURES, "cpu_active", "joules_per_sample")
_GPU_ONLY = "a GPU's counter; this run is on a CPU"


class Counter(Protocol):
    """Something that is read at both ends of a region.

    `reasons` has an entry for each figure that can't be read, from the start or since it failed.
    """

    reasons: dict[str, str]

    def start(self) -> None:
        """Begin a region. Never raises: a refusal becomes a reason."""

    def stop(self, seconds: float) -> dict[str, float]:
        """End it: what was read over these seconds, by the name of `Reading`'s field. Never raises."""


# Of a GPU's utilization: counters with a name, and the figures they give at best.
UtilizationCounters = Gpm | PmSampling | Kineto
_SOURCES: tuple[type[UtilizationCounters], ...] = (Gpm, PmSampling, Kineto)  # the most trusted first


@dataclass(frozen=True)
class Reading:
    """What was read over a region; None where a counter could not be read."""

    seconds: float
    cpu_active: float | None = None  # share of the usable cores, 0..1
    sm_active: float | None = None  # shares of the GPU over the region, 0..1
    sm_occupancy: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None
    sm_clock_mhz: float | None = None  # mean over the looks taken in the region, of which one is at its end
    throttled: float | None = None  # share of them at which something but idling or the user's settings lowered it
    power_capped: float | None = None  # share of them at which the power limit did
    joules: float | None = None  # of regions under 5 s it tells little: the counter lags


class Region:
    """Brackets a region of work: `start`, the work, `stop`. Regions of one batch size are added up by the caller."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source: UtilizationCounters | None = None  # of the utilization
        self.better: dict[str, str] = {}  # why a better source is not used, by its name
        self.meter: Nvml | Rapl = Rapl() if device.type == "cpu" else Nvml(device)  # of energy
        self.counters: list[Counter] = [self.meter]
        if device.type == "cpu":
            self.counters.append(CpuTime())
            return
        self._passed: list[UtilizationCounters] = []
        for kind in _SOURCES:
            source = kind(device)
            if not source.reasons.keys() >= set(source.figures):
                self.source = source
                self.counters.append(source)
                return
            self._passed.append(source)
            self.better[source.name] = "; ".join(dict.fromkeys(source.reasons[f] for f in source.figures))

    @property
    def reasons(self) -> dict[str, str]:
        """Why a figure can't be read, by the name of the record's field; it may grow during a run."""
        found = dict.fromkeys(GPU_FIGURES, _GPU_ONLY) if self.device.type == "cpu" else {"cpu_active": "a run on a GPU"}
        for counter in self.counters:
            found |= counter.reasons
        if self.better:
            tried = self._passed + ([self.source] if self.source is not None else [])
            for figure in Gpm.figures:
                causes = [f"{s.name}: {s.reasons[figure]}" for s in tried if figure in s.reasons]
                if len(causes) == len(tried):
                    found[figure] = "; ".join(causes)
        if "joules" in found:
            found["joules_per_sample"] = found.pop("joules")
        return found

    def start(self) -> None:
        """Begin a region."""
        for counter in self.counters:
            counter.start()
        self._began = time.perf_counter()

    def look(self) -> None:
        """Look at the clock and what lowers it, within a region: the state at its end alone may be a moment's."""
        if isinstance(self.meter, Nvml):
            self.meter.look()

    def stop(self) -> Reading:
        """End it."""
        seconds = time.perf_counter() - self._began
        values: dict[str, float] = {}
        for counter in self.counters:
            values |= counter.stop(seconds)
        return Reading(seconds, **values)

    def estimated(self, reading: Reading, work: Callable[[], object], step_s: float) -> Reading:
        """A reading with what can only be estimated from more steps of the work; the reading itself elsewhere."""
        return replace(reading, **self.source.estimate(work, step_s)) if isinstance(self.source, Kineto) else reading

    @property
    def origins(self) -> dict[str, str]:
        """Where a figure does not come from the best source: which it is and why, by the record's field."""
        if self.source is None or not self.better:
            return {}
        how = "estimated from kernel times and launch shapes by" if isinstance(self.source, Kineto) else "read by"
        why = "; ".join(f"{name}: {reason}" for name, reason in self.better.items())
        return dict.fromkeys(self.source.figures, f"{how} {self.source.name}, not by a better source ({why})")


def mean(readings: Sequence[Reading], figure: str) -> float | None:
    """A figure over regions of one batch, weighted by their length; None where none of them has it."""
    known = [(r.seconds, getattr(r, figure)) for r in readings if getattr(r, figure) is not None]
    seconds = sum(s for s, _ in known)
    return sum(s * value for s, value in known) / seconds if seconds > 0 else None


def readable(region: Region) -> dict[str, str | None]:
    """Every figure of a batch that comes from a counter: None when it can be read here, else why it cannot."""
    reasons = region.reasons
    return {figure: reasons.get(figure) for figure in FIGURES}
