"""When enough steps of one batch size have been timed. Knows nothing of how they are timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import bdtr

_BLOCKS = 20  # of successive steps, once there are twice as many steps
_Z95 = 1.96


@dataclass(frozen=True)
class Median:
    """Median step time and its 95 % interval, seconds; no interval below 6 samples."""

    value: float
    low: float | None
    high: float | None

    @property
    def relative_error(self) -> float:
        """Standard error of the median as a share of it; infinite where there is no interval."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / (2 * _Z95 * self.value)


def blocks(seconds: Sequence[float]) -> list[float]:
    """Medians of 20 runs of successive steps; the steps themselves while there are fewer than 40.

    Disturbances last for many steps, so that successive steps are not independent; their runs nearly are.
    """
    if len(seconds) < 2 * _BLOCKS:
        return list(seconds)
    return [float(np.median(part)) for part in np.array_split(np.asarray(seconds), _BLOCKS)]


def median(seconds: Sequence[float]) -> Median:
    """Median of step times with its distribution-free 95 % interval, from the order statistics of `blocks`."""
    value = float(np.median(seconds))
    ordered = sorted(blocks(seconds))
    rank = _rank(len(ordered))
    if rank is None:
        return Median(value, None, None)
    return Median(value, min(value, ordered[rank]), max(value, ordered[-1 - rank]))


@dataclass(frozen=True)
class StoppingRule:
    """Enough: at least `min_samples` steps and `min_seconds`, and then steady, or no longer improving, or timed out."""

    min_samples: int = 10
    min_seconds: float = 0.5
    relative_error: float = 0.005  # of the median: below run-to-run drift
    patience: int = 3  # looks without improvement
    improvement: float = 0.05  # of the relative error, that counts as one
    max_seconds: float = math.inf

    def met(self, count: int, seconds: float, errors: Sequence[float]) -> str | None:
        """Why to stop, or None to go on.

        Args:
            count: steps timed.
            seconds: time spent in them.
            errors: relative error of the median after each look so far.
        """
        if seconds >= self.max_seconds:
            return "timeout"
        if count < self.min_samples or seconds < self.min_seconds:
            return None
        if errors[-1] < self.relative_error:
            return "steady"
        before, recent = errors[: -self.patience], errors[-self.patience :]
        if before and min(recent) > min(before) * (1 - self.improvement):
            return "no longer improving"
        return None


@cache
def _rank(n: int) -> int | None:
    """Largest r such that the r-th smallest and r-th largest (from 0) of n hold the median in >= 95 %; None below 6."""
    fits = [r for r in range(n // 2) if bdtr(r, n, 0.5) <= 0.025]
    return fits[-1] if fits else None
