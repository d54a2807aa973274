"""The handle of a fused optimizer, which takes the norms of micro-batches in its own pass."""

from __future__ import annotations

from typing import Any

from pybatch.errors import UsageError
from pybatch.noise.handle import Handle
from pybatch.optim import FusedOptimizer
from pybatch.records import NoiseScale


class OptimizerNoise(Handle):
    """Reads `opt.noise`; counts and state are the optimizer's own."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        _ = optimizer.noise  # refuses an optimizer made without noise=True
        self._optimizer = optimizer

    @property
    def noise(self) -> NoiseScale:
        return self._optimizer.noise

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
