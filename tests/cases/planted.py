"""A measurement on a planted device: a small workload, a clock that decides what steps take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pybatch.capacity import measurement
from pybatch.capacity.modes import EAGER, Mode
from pybatch.device.clock import Clock
from pybatch.records import Capacity
from pybatch.workloads.base import Split, Workload

CPU = torch.device("cpu")


class Small(Workload):
    """Two layers."""

    name = "small"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, 4, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch).square().mean()
        return loss


class PlantedClock(Clock):
    """alpha + beta n seconds a step; `slowed` times that once the device has worked `patience` s without a rest."""

    def __init__(self, alpha: float, beta: float, slowed: float = 1.0, patience: float = 1.0) -> None:
        self.alpha, self.beta, self.slowed, self.patience = alpha, beta, slowed, patience
        self.time_s = self.busy_s = 0.0
        self.batch: Callable[[], int] = lambda: 0
        self.rng = np.random.default_rng(0)

    def time(self, work: Callable[[], object], count: int) -> list[float]:
        work()
        found = []
        for _ in range(count):
            step = (self.alpha + self.beta * self.batch()) * float(np.exp(self.rng.normal(0, 0.005)))
            step *= self.slowed if self.busy_s > self.patience else 1.0
            self.busy_s += step
            self.time_s += step
            found.append(step)
        return found

    def now(self) -> float:
        return self.time_s

    def rest(self, seconds: float) -> None:
        self.time_s += seconds
        self.busy_s = 0.0


class NoMemory:
    reason = "not read here"

    def start(self) -> None: ...

    def rebase(self, held_bytes: int) -> None: ...

    def peak(self) -> None: ...


def measure(
    work: Workload, clock: PlantedClock, batches: list[int] | None, budget: float = 100.0, mode: Mode = EAGER
) -> Capacity:
    run = measurement._Measurement(work, CPU, "fp32", batches, budget, 0, clock, mode=mode)
    clock.batch = lambda: run.explorer.step.batch_size
    run.explorer.memory = NoMemory()  # type: ignore[assignment]
    run.measure(False)
    return run.found.capacity()
