"""Utilization estimated from a trace of the kernels, where no counter of the GPU can be read.

Tracing slows the host, so that it is done in a pass of its own, and kernel times are set against the step time taken
without it. The formulas are those of PyTorch's profiler plugin ("Est. SM Efficiency", "Est. Achieved Occupancy"), but
both over the whole step, as the counters are.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TRACE_S = 0.1  # of steps, where they are short
_MOST_STEPS = 5
_BLIND = "a trace of kernels does not tell it"


class Kineto:
    """Shares of SMs and of warps in use, estimated from times and launch shapes of the kernels of a few steps.

    It reads nothing around a region; `estimate` runs steps of its own.
    """

    name = "Kineto"
    figures = ("sm_active", "sm_occupancy")

    def __init__(self, device: torch.device) -> None:
        self.reasons: dict[str, str] = dict.fromkeys(("tensor_active", "dram_active"), _BLIND)
        self._device = device
        if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
            self._fail("this torch's profiler cannot trace kernels (built without CUPTI)")

    def start(self) -> None:
        """Nothing is read around a region."""

    def stop(self, seconds: float) -> dict[str, float]:
        """Nothing is read around a region."""
        return {}

    def estimate(self, work: Callable[[], object], step_s: float) -> dict[str, float]:
        """`sm_active` and `sm_occupancy` of steps that take `step_s` seconds without tracing; never raises.

        sm_active = sum of t_k min(1, blocks_k / SMs) / T, sm_occupancy = sum of t_k occupancy_k / T: a kernel of fewer
        blocks than SMs leaves SMs idle. Kernels that run side by side count one after the other; a share ends at 1.
        """
        if self.reasons.keys() >= set(self.figures):
            return {}
        count = max(1, min(_MOST_STEPS, math.ceil(_TRACE_S / step_s)))
        try:
            kernels = [event for event in trace(work, count, self._device) if event.get("cat") == "kernel"]
        except (RuntimeError, OSError, ValueError) as error:
            self._fail(f"the trace failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return {}
        if not kernels:
            self._fail("the trace holds no kernel: CUPTI may lack the permission, or another profiler is attached")
            return {}
        whole = count * step_s * 1e6  # a trace's times are microseconds
        shares = {
            "sm_active": [_times(k, "blocks per SM", 1.0) for k in kernels],
            "sm_occupancy": [_times(k, "est. achieved occupancy %", 100.0) for k in kernels],
        }
        found = {}
        for figure, parts in shares.items():
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                found[figure] = min(1.0, sum(known) / whole)
            else:
                self.reasons[figure] = "the trace lacks a kernel's launch shape"
        return found

    def _fail(self, why: str) -> None:
        self.reasons |= {figure: why for figure in self.figures if figure not in self.reasons}


def trace(work: Callable[[], object], count: int, device: torch.device) -> list[dict[str, Any]]:
    """The events of `count` calls, as in the profiler's trace file: kernels have `dur` in microseconds and `args`."""
    with tempfile.TemporaryDirectory(prefix="pybatch-trace-") as folder:
        path = Path(folder) / "trace.json"
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CUDA if device.type == "cuda" else kinds.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(count):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return events


def _times(kernel: dict[str, Any], argument: str, whole: float) -> float | None:
    """Microseconds of a kernel times a share of the device that one of its arguments tells."""
    value = kernel.get("args", {}).get(argument)
    if not isinstance(value, int | float) or value < 0:
        return None
    return float(kernel["dur"]) * min(1.0, value / whole)
