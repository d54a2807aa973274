"""Steps against step time: the quantities the verdict weighs, and the model of time to a loss.

Time to a loss is T(B) = S(B) t(B), with S(B) = S_min (1 + B_c / B) optimizer steps (McCandlish et al. 2018, eq. 2.11)
and t(B) seconds per step. For t = alpha + beta B it is least at B* = sqrt(B_c alpha / beta), the geometric mean of
critical batch and half batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pybatch.fits.communication import step_s
from pybatch.records import CommunicationFit, Curve, Reason, ThroughputFit

EFFICIENCY = 0.8  # parallel efficiency below which a further device is not called worth it
MAX_DEVICES = 65_536  # the search for devices ends here
_BLOCK = 1024  # numbers of devices looked at together
_GRID = np.geomspace(1 / 64, 256, 800)  # steps of 1.2 %, around the optimum without communication
DISTURBED = 0.3  # rms of ln(measured / fitted) from which no advice stands on the fit: caches and tiles bend it less

Inputs = dict[str, float | str | None]


@dataclass(frozen=True)
class TimeModel:
    """Modelled time to a loss: steps 1 + critical / B times t(B / K) on K devices.

    Communication is counted where it was measured; else time on several devices is a lower bound.
    """

    fit: ThroughputFit
    critical: float
    most: float = math.inf  # largest batch on one device
    most_global: float = math.inf  # largest batch on all devices together: the data set
    communication: CommunicationFit | None = None

    @property
    def knee(self) -> float:
        """Batch per device at which a floor ends: smaller ones take the same time. 0 for the affine model."""
        fit = self.fit
        return (fit.t0_s - fit.alpha_s) / fit.beta_s if fit.model == "floor" else 0.0

    def optimum(self, devices: Any = 1.0) -> Any:
        """Global batch of least time: sqrt(B_c K alpha / beta), not below the floor's knee, within bounds, >= 1.

        With communication there is no closed form: the best of a fine grid around it.
        """
        free = np.maximum(np.sqrt(self.critical * devices * self.fit.alpha_s / self.fit.beta_s), devices * self.knee)
        closed = np.maximum(np.minimum(np.minimum(free, devices * self.most), self.most_global), 1.0)
        if self.communication is None:
            return closed
        k = np.atleast_1d(np.asarray(devices, dtype=float))[:, None]
        bound = np.minimum(k * self.most, self.most_global)
        grid = np.clip(np.atleast_1d(closed)[:, None] * _GRID, 1.0, np.maximum(bound, 1.0))
        best = np.argmin(self.time(grid, k), axis=1)
        found = np.where(k[:, 0] > 1, grid[np.arange(len(grid)), best], np.atleast_1d(closed))
        return found if np.ndim(devices) else found[0]

    def time(self, batch: Any, devices: Any = 1.0) -> Any:
        """Time to the loss at this global batch, in seconds per S_min: only ratios mean something."""
        floor = self.fit.t0_s if self.fit.model == "floor" else 0.0
        step = np.maximum(self.fit.alpha_s + self.fit.beta_s * batch / devices, floor)
        if self.communication is not None:
            step = np.where(np.asarray(devices) > 1, step_s(self.communication, step, devices), step)
        return (1 + self.critical / batch) * step

    def useful_devices(self) -> int:
        """Most devices K with T(1) / (K T(K)) >= EFFICIENCY all the way up to K, each K at its own best batch."""
        alone = float(self.time(self.optimum()))
        for first in range(1, MAX_DEVICES, _BLOCK):
            k = np.arange(first, first + _BLOCK, dtype=float)
            poor = np.flatnonzero(alone / (k * self.time(self.optimum(k), k)) < EFFICIENCY)
            if len(poor):
                return int(k[poor[0]]) - 1
        return MAX_DEVICES


@dataclass(frozen=True)
class Critical:
    """The critical batch with the evidence it stands on."""

    value: float | None
    low: float | None
    high: float | None
    source: str | None
    reason: Reason
    curve: Curve | None = None  # steps to target, where they were measured


@dataclass(frozen=True)
class Bound:
    """The largest batch that can be used, and what sets it."""

    value: float
    name: str | None  # "memory", "the data set"; None: unbounded


@dataclass(frozen=True)
class Wall:
    """What one device can take: its saturation batch, or the largest batch that fits where that is smaller."""

    name: str
    value: float
    low: float
    high: float
    extrapolated: bool = False  # past the largest batch measured


@dataclass(frozen=True)
class Best:
    """The batch to use, and the interval of the optimum it was rounded from."""

    batch: int
    optimum: float
    low: int  # 95 % interval of the optimum, in whole examples
    high: int | None  # None: open
    extrapolated: bool  # past the largest batch timed
    model: TimeModel
    reason: Reason
