"""What can be read around a steady region of work, behind one small protocol.

A counter that cannot be read gives None and a reason, also where it fails only in mid-run; nothing is estimated in its
place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pybatch.device.counters_cpu import CpuTime, Rapl
from pybatch.device.counters_nvml import Gpm, Nvml

GPU_FIGURES = ("sm_active", "sm_occupancy", "tensor_active", "dram_active", "sm_clock_mhz", "throttled", "power_capped")
FIGURES = (*GPU_FIGURES, "cpu_active", "joules_per_sample")
_MIN_ENERGY_S = 5.0  # below this, the energy counter's update period (~100 ms) is more than 2 % of the window
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


@dataclass(frozen=True)
class Reading:
    """What was read over a region; None where a counter could not be read."""

    seconds: float
    cpu_active: float | None = None  # share of the usable cores, 0..1
    sm_active: float | None = None  # shares of the GPU over the region, 0..1
    sm_occupancy: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None
    sm_clock_mhz: float | None = None  # at the region's end
    throttled: float | None = None  # 1: something other than idling or the user's settings lowered the clock
    power_capped: float | None = None  # 1: the power limit did
    joules: float | None = None


class Region:
    """Brackets a region of work: `start`, the work, `stop`. Regions of one batch size are added up by the caller."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters: list[Counter] = [CpuTime(), Rapl()] if device.type == "cpu" else [Nvml(device), Gpm(device)]

    @property
    def reasons(self) -> dict[str, str]:
        """Why a figure can't be read, by the name of the record's field; it may grow during a run."""
        found = dict.fromkeys(GPU_FIGURES, _GPU_ONLY) if self.device.type == "cpu" else {"cpu_active": "a run on a GPU"}
        for counter in self.counters:
            found |= counter.reasons
        if "joules" in found:
            found["joules_per_sample"] = found.pop("joules")
        return found

    def start(self) -> None:
        """Begin a region."""
        for counter in self.counters:
            counter.start()
        self._began = time.perf_counter()

    def stop(self) -> Reading:
        """End it."""
        seconds = time.perf_counter() - self._began
        values: dict[str, float] = {}
        for counter in self.counters:
            values |= counter.stop(seconds)
        return Reading(seconds, **values)


def mean(readings: Sequence[Reading], figure: str) -> float | None:
    """A figure over regions of one batch, weighted by their length; None where none of them has it."""
    known = [(r.seconds, getattr(r, figure)) for r in readings if getattr(r, figure) is not None]
    seconds = sum(s for s, _ in known)
    return sum(s * value for s, value in known) / seconds if seconds > 0 else None


def joules(readings: Sequence[Reading]) -> float | None:
    """Energy over regions of one batch, J; None where unreadable or where they last less than 5 s together."""
    if sum(reading.seconds for reading in readings) < _MIN_ENERGY_S:
        return None
    values = [reading.joules for reading in readings]
    return sum(v for v in values if v is not None) if None not in values else None


def readable(device: torch.device) -> dict[str, str | None]:
    """Every figure of a batch that comes from a counter: None when it can be read here, else why it cannot."""
    reasons = Region(device).reasons
    return {figure: reasons.get(figure) for figure in FIGURES}


def energy_reason(reasons: dict[str, str]) -> str:
    """Why a batch has no energy figure."""
    short = f"the steady region is shorter than {_MIN_ENERGY_S:g} s, too short for the energy counter"
    return reasons.get("joules_per_sample", short)
