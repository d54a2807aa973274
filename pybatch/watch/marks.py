"""Moments of a training, and the seconds between them: the host's clock on a CPU, events of its stream on a GPU."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Marks moments at next to no cost; the seconds between two are asked for later."""

    def mark(self) -> Any:
        """This moment, as the device comes to it."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has come to this moment, so that asking for seconds waits for nothing."""

    def seconds(self, first: Any, last: Any) -> float:
        """From one moment to another."""


class HostMarks:
    """`time.perf_counter`."""

    mark = staticmethod(time.perf_counter)

    def reached(self, mark: float) -> bool:
        """As Marks.reached."""
        return True

    def seconds(self, first: float, last: float) -> float:
        """As Marks.seconds."""
        return last - first


class StreamMarks:
    """CUDA events: between the end of a step and the next forward pass, what they show is the device's waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """As Marks.mark."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def reached(self, mark: Any) -> bool:
        """As Marks.reached."""
        return bool(mark.query())

    def seconds(self, first: Any, last: Any) -> float:
        """As Marks.seconds."""
        return float(first.elapsed_time(last)) / 1e3


def marks_for(device: torch.device) -> Marks:
    """The marks of a device."""
    return StreamMarks(device) if device.type == "cuda" else HostMarks()
