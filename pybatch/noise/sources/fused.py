"""The handle of a fused optimizer, which takes the norms of micro-batches in its own pass."""

from __future__ import annotations

import dataclasses
from typing import Any

from pybatch.base.errors import UsageError
from pybatch.noise.handle import Handle
from pybatch.optim import FusedOptimizer
from pybatch.records import NoiseScale


class OptimizerNoise(Handle):
    """Reads `opt.noise`; counts and state are the optimizer's own, and `unit` says what it was given to count."""

    def __init__(self, optimizer: FusedOptimizer, unit: str | None = None) -> None:
        _ = optimizer.noise  # refuses an optimizer made without noise=True
        self._optimizer, self._unit = optimizer, unit

    @property
    def noise(self) -> NoiseScale:
        return dataclasses.replace(self._optimizer.noise, unit=self._unit)

    def count(self, n: float) -> None:
        raise UsageError(f"count({n!r}): a fused optimizer counts in opt.accumulate(n). Leave the call out.")

    def detach(self) -> None:
        """Nothing to take off: the optimizer goes on measuring."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the statistics are in the optimizer's own state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise UsageError(
                "a fused optimizer keeps the statistics in its own state. Load optimizer.load_state_dict()."
            )
