"""Several processes that run the same pass again together: one clock for all, and decisions that all take alike.

Every time that a decision may stand on is agreed on first. So all processes make the same steps in the same order, as
their collectives need, without being told to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pybatch.device.clock import Clock, Work


class Together:
    """The processes of the default group."""

    def __init__(self, device: torch.device) -> None:
        self.world, self._rank = dist.get_world_size(), dist.get_rank()
        self._device = device if dist.get_backend() == "nccl" else torch.device("cpu")

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each over the processes."""
        found = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(value) for value in found.tolist()]

    def first(self, value: float) -> float:
        """The first process's value."""
        found = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.broadcast(found, 0)
        return float(found.item())

    def all(self, one: Any) -> list[Any]:
        """What each process has, in their order: plain numbers and tuples."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, one)
        return found

    def any(self, one: bool) -> bool:
        """Whether it is so in some process."""
        return self.largest([float(one)])[0] > 0


class CommonClock(Clock):
    """A clock that shows all processes the same: the slowest one's time of each step, the first one's time of day."""

    def __init__(self, inner: Clock, together: Together) -> None:
        self._inner, self._together = inner, together
        self.host_bound_reason = "not told of several processes"

    def time(self, work: Work, count: int) -> list[float]:
        """As Clock.time."""
        return self._together.largest(self._inner.time(work, count))

    def now(self) -> float:
        """As Clock.now."""
        return self._together.first(self._inner.now())


class RankFailed(SystemExit):
    """This process ran out of memory where the others wait for it: it ends, and its launcher ends them all."""


def together(device: torch.device) -> Together | None:
    """The processes that train together; None where this one is alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return Together(device)
