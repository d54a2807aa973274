"""The model of time to a loss: steps against step time, on one device and on several.

Time to a loss is T(B) = S(B) t(B), with S(B) optimizer steps and t(B) seconds per step. Where steps were measured, S
is the model fitted to them; where the critical batch alone is known, S = S_min (1 + B_c / B) (McCandlish et al. 2018,
eq. 2.11). For that and t = alpha + beta B, time is least at B* = sqrt(B_c alpha / beta), the geometric mean of critical
batch and half batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pybatch.fits.communication import step_s
from pybatch.fits.steps_model import predicted_all
from pybatch.records import CommunicationFit, StepsFit, ThroughputFit

EFFICIENCY = 0.8  # parallel efficiency below which a further device is not called worth it
MAX_DEVICES = 65_536  # the search for devices ends here
_BLOCK = 1024  # numbers of devices looked at together
_GRID = np.geomspace(1 / 64, 256, 800)  # steps of 1.2 %, around the closed form
_FINE = np.geomspace(1 / 1.015, 1.015, 31)  # and around the best of those: 0.1 %
DISTURBED = 0.3  # rms of ln(measured / fitted) from which no advice stands on the fit: caches and tiles bend it less

Inputs = dict[str, float | str | None]


@dataclass(frozen=True)
class TimeModel:
    """Modelled time to a loss: steps S(B) times t(B / K) on K devices.

    Communication is counted where it was measured; else time on several devices is a lower bound. `shape` is the fit
    of steps whose curve S follows; None: the hyperbola. It is moved along the batch axis to the critical batch given,
    which is how an end of that one's interval acts.
    """

    fit: ThroughputFit
    critical: float
    most: float = math.inf  # largest batch on one device
    most_global: float = math.inf  # largest batch on all devices together: the data set
    communication: CommunicationFit | None = None
    shape: StepsFit | None = None

    @property
    def law(self) -> str:
        """How steps depend on the batch size, in words."""
        if self.shape is None:
            return "steps 1 + critical batch / batch"
        return f"steps by the {self.shape.model} model fitted to them"

    def steps(self, batch: Any) -> Any:
        """Steps to the loss at this global batch, over S_min."""
        if self.shape is None or not self.critical:
            return 1 + self.critical / batch
        assert self.shape.model is not None  # `shaped` has looked
        assert self.shape.critical_batch is not None
        moved = np.asarray(batch, dtype=float) * (self.shape.critical_batch / self.critical)
        found = predicted_all(self.shape.model, self.shape.parameters, moved) / (self.shape.s_min or 1.0)
        return found if np.ndim(batch) else float(found)

    def examples(self, batch: Any) -> Any:
        """Examples to the loss, over S_min: their ratios are those of cost."""
        return batch * self.steps(batch)

    @property
    def knee(self) -> float:
        """Batch per device at which a floor ends: smaller ones take the same time. 0 for the affine model."""
        fit = self.fit
        return (fit.t0_s - fit.alpha_s) / fit.beta_s if fit.model == "floor" else 0.0

    def optimum(self, devices: Any = 1.0) -> Any:
        """Global batch of least time: sqrt(B_c K alpha / beta), not below the floor's knee, within bounds, >= 1.

        With communication or another curve of steps there is no closed form: the best of a fine grid around it.
        """
        free = np.maximum(np.sqrt(self.critical * devices * self.fit.alpha_s / self.fit.beta_s), devices * self.knee)
        closed = np.maximum(np.minimum(np.minimum(free, devices * self.most), self.most_global), 1.0)
        if self.communication is None and self.shape is None:
            return closed
        k = np.atleast_1d(np.asarray(devices, dtype=float))[:, None]
        bound = np.maximum(np.minimum(k * self.most, self.most_global), 1.0)
        found = np.atleast_1d(closed)[:, None]
        for steps in (_GRID, _FINE):
            grid = np.clip(np.concatenate([found * steps, k * self.knee], axis=1), 1.0, bound)
            best = np.argmin(self.time(grid, k), axis=1)
            found = grid[np.arange(len(grid)), best][:, None]
        if self.shape is None:  # one device does not communicate
            found = np.where(k > 1, found, np.atleast_1d(closed)[:, None])
        return found[:, 0] if np.ndim(devices) else found[0, 0]

    def time(self, batch: Any, devices: Any = 1.0) -> Any:
        """Time to the loss at this global batch, in seconds per S_min: only ratios mean something."""
        floor = self.fit.t0_s if self.fit.model == "floor" else 0.0
        step = np.maximum(self.fit.alpha_s + self.fit.beta_s * batch / devices, floor)
        if self.communication is not None:
            step = np.where(np.asarray(devices) > 1, step_s(self.communication, step, devices), step)
        return self.steps(batch) * step

    def useful_devices(self) -> int:
        """Most devices K with T(1) / (K T(K)) >= EFFICIENCY all the way up to K, each K at its own best batch."""
        alone = float(self.time(self.optimum()))
        for first in range(1, MAX_DEVICES, _BLOCK):
            k = np.arange(first, first + _BLOCK, dtype=float)
            poor = np.flatnonzero(alone / (k * self.time(self.optimum(k), k)) < EFFICIENCY)
            if len(poor):
                return int(k[poor[0]]) - 1
        return MAX_DEVICES
