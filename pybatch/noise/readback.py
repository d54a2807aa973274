"""Rows of one step each, kept on the device and brought to the host in bulk, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

ROWS = 64  # steps between transfers


class Readback:
    """A buffer of float64 rows on the device.

    Args:
        columns: numbers per row.
        device: where the rows are made.
        take: called with [rows, columns] on the host, in order of time.

    A full buffer is copied to pinned memory behind the work that filled it, and handed on when the next one is full:
    by then, 64 steps later, it has long arrived.
    """

    def __init__(self, columns: int, device: torch.device, take: Callable[[NDArray[np.float64]], None]) -> None:
        self._rows = torch.zeros((ROWS, columns), dtype=torch.float64, device=device)
        self._take, self._used = take, 0
        self._host: list[tuple[float, ...]] = []
        self._flying: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def append(self, row: torch.Tensor) -> None:
        """Keep a row: [columns] float64 on the device."""
        self._rows[self._used].copy_(row)
        self._used += 1
        if self._used == ROWS:
            self._send()

    def put(self, row: tuple[float, ...]) -> None:
        """Keep a row that is on the host already."""
        self._host.append(row)
        if len(self._host) == ROWS:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._host:
            rows, self._host = np.array(self._host), []
            self._take(rows)

    def drain(self) -> None:
        """Hand on everything. Waits for the device."""
        self._hand_on()
        self._land()
        if self._used:
            self._take(self._rows[: self._used].cpu().numpy())
            self._used = 0

    def _send(self) -> None:
        if self._rows.device.type != "cuda":
            self.drain()
            return
        self._land()
        host = torch.empty(self._rows.shape, dtype=torch.float64, pin_memory=True)
        host.copy_(self._rows, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._rows.device))
        self._flying, self._used = (host, event), 0

    def _land(self) -> None:
        if self._flying is not None:
            host, event = self._flying
            event.synchronize()
            self._flying = None
            self._take(host.numpy())
