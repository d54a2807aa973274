"""An NVIDIA GPU's utilization by CUPTI's PM sampling, for GPUs before Hopper; through NVIDIA's `cupti-python`.

The hardware samples its own counters at a fixed interval while the work runs; nothing is replayed or serialized.
Metrics are named as in Nsight Compute. Turing is the first architecture that can.
"""

from __future__ import annotations

import importlib
import math
from importlib import metadata
from typing import Any

import torch

_INTERVAL_S = 2e-3  # 50 samples in GPM's shortest region; evaluating one costs the host some microseconds
_SYSTEM_CLOCK_HZ = 1.4e9  # roughly, where the interval can only be given in its cycles (Turing, GA100)
_BUFFER_BYTES = 64 << 20  # some kilobytes a sample: minutes
_PERCENT = ".avg.pct_of_peak_sustained_elapsed"
_CANDIDATES: dict[str, tuple[tuple[str, ...], ...]] = {  # our figure: metrics whose sum it is, by preference
    "sm_active": (("sm__cycles_active",),),
    "sm_occupancy": (("sm__warps_active",),),
    "tensor_active": (("sm__pipe_tensor_cycles_active",), ("sm__inst_executed_pipe_tensor",)),
    "dram_active": tuple((f"{unit}__read_throughput", f"{unit}__write_throughput") for unit in ("dram", "dramc")),
}


class PmSampling:
    """Shares of SMs, warps, tensor cores and DRAM over a region: means of the samples, weighted by their length."""

    name = "CUPTI PM sampling"
    figures = tuple(_CANDIDATES)

    def __init__(self, device: torch.device) -> None:
        self.reasons: dict[str, str] = {}
        self._collector: Any = None
        self._sampling = False
        self._metrics: dict[str, tuple[str, ...]] = {}  # of the figures that can be had together
        library = _library()
        if isinstance(library, str):
            self._fail(library)
            return
        # Of a profiling library, of whatever version, any error is a reason: it must not cost the run.
        try:
            self._collector = library.Collector(device.index or 0)
            self._collector.enable()
        except Exception as error:
            self._fail(_text(error))
            return
        self._configure(library)

    def start(self) -> None:
        """Begin a region."""
        self._sampling = False
        if self._metrics:
            try:
                self._collector.start()
                self._sampling = True
            except Exception as error:
                self._fail(_text(error))

    def stop(self, seconds: float) -> dict[str, float]:
        """The shares over the region; nothing where it was too short for a sample."""
        if not self._sampling:
            return {}
        self._sampling = False
        try:
            self._collector.stop()
            data = self._collector.decode(64 + 2 * math.ceil(seconds / _INTERVAL_S))
            names = {name: i for i, name in enumerate(data.metrics)}
            samples = [(s.end_timestamp - s.start_timestamp, s.metric_values) for s in data]
        except Exception as error:
            self._fail(_text(error))
            return {}
        found = {}
        for figure, metrics in self._metrics.items():
            known = [(length, sum(values[names[m]] for m in metrics)) for length, values in samples]
            known = [(length, value) for length, value in known if length > 0 and math.isfinite(value)]
            if known:
                found[figure] = sum(length * v for length, v in known) / sum(length for length, _ in known) / 100.0
        return found

    def _configure(self, library: Any) -> None:
        """Find the figures that this GPU can sample in one pass, with the clock that it can sample by."""
        triggers = library.TriggerMode
        for mode, interval in (
            (triggers.GPU_TIME_INTERVAL, round(_INTERVAL_S * 1e9)),
            (triggers.GPU_SYSCLK_INTERVAL, round(_INTERVAL_S * _SYSTEM_CLOCK_HZ)),
        ):
            refused = self._add_figures(mode, interval)
            if self._metrics:
                break
        self.reasons |= refused
        if self._metrics and refused:  # the last attempt was a refused one
            self._try(self._metrics, mode, interval)

    def _add_figures(self, mode: Any, interval: int) -> dict[str, str]:
        """Take on figure after figure; gives the reasons of those that cannot be had beside the ones before."""
        refused: dict[str, str] = {}
        for figure, choices in _CANDIDATES.items():
            for choice in choices:
                wanted = {**self._metrics, figure: tuple(name + _PERCENT for name in choice)}
                error = self._try(wanted, mode, interval)
                if error is None:
                    self._metrics = wanted
                    break
                refused.setdefault(figure, error)
            if figure in self._metrics:
                refused.pop(figure, None)
        return refused

    def _try(self, metrics: dict[str, tuple[str, ...]], mode: Any, interval: int) -> str | None:
        try:
            self._collector.configure(
                metrics=[name for names in metrics.values() for name in names],
                hardware_buffer_size=_BUFFER_BYTES,
                sampling_interval=interval,
                trigger_mode=mode,
            )
        except Exception as error:
            return _text(error)
        return None

    def _fail(self, why: str) -> None:
        self._metrics = {}
        self.reasons |= {figure: why for figure in self.figures if figure not in self.reasons}


def _library() -> Any | str:
    """The module `cupti.pm_sampling`, or the reason why it cannot be used."""
    try:
        version = metadata.version("cupti-python")
    except metadata.PackageNotFoundError:
        return "cupti-python is not installed (13.3 or later, for CUDA 13: the extra 'cupti')"
    try:
        return importlib.import_module("cupti.pm_sampling")
    except ModuleNotFoundError as error:
        if error.name == "cupti.pm_sampling":
            return f"cupti-python {version} has no PM sampling; it came with 13.3"
        return f"cupti-python {version} does not load: {error}"
    except Exception as error:  # CUPTI itself is missing, or of another CUDA
        return f"cupti-python {version} does not load: {_text(error)}"


def _text(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
