"""Data-parallel step time on 1, 2, 4, ... of the processes that `torchrun` started, and the fit of communication.

Every process runs this at the same time and takes the same decisions: what process 0 saw is told to the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pybatch.base.errors import UsageError
from pybatch.capacity.stopping import median
from pybatch.device.clock import clock_for
from pybatch.fits.communication import AllReduce, fit_communication
from pybatch.records import Distributed, DistributedPoint, Note
from pybatch.workloads.base import Progress, Workload
from pybatch.workloads.running.batches import Reused
from pybatch.workloads.running.session import Session

_INTERFACE = "GLOO_SOCKET_IFNAME"
_VISITS = 3  # of each batch and device count, in random order
_LEAST_STEPS = 3  # of a visit
_REDUCE_BYTES = (1 << 12, 1 << 20)  # beside the gradient's own size, to tell latency from bandwidth
_REDUCES = 7  # all-reduces of each size; the median counts
_PATIENCE = timedelta(hours=1)  # one process measures alone for minutes while the others wait


def launched() -> bool:
    """Whether `torchrun` (or a like launcher) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The index of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(device: torch.device) -> Iterator[int]:
    """Joins the processes for a while, each with its device; gives this one's rank."""
    if device.type == "cuda":  # objects and barriers go over the current device, which is GPU 0 in every process
        torch.cuda.set_device(device)
    with _on_loopback():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        try:
            yield dist.get_rank()
        finally:
            dist.destroy_process_group()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Where all processes are on this machine, gloo listens there alone, unless its variable says otherwise."""
    loopback = _loopback()
    local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not local or _INTERFACE in os.environ or loopback is None:
        yield
        return
    os.environ[_INTERFACE] = loopback
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _loopback() -> str | None:
    """The name of the interface that only this machine reaches."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return str(name)
    return None


def measure_distributed(
    workload: Workload,
    *,
    device: torch.device,
    dtype: str,
    batches: Sequence[int],
    time_budget: float,
    seed: int,
    progress: Progress | None = None,
) -> Distributed:
    """Time data-parallel steps on 1, 2, 4, ..., all processes, and fit how communication overlaps.

    To be called by every process of the group. A step is forward, backward with DDP's all-reduce, and the update; its
    computation alone is timed under `no_sync`, also on all processes at once, so that cores and memory they share
    are counted to computing.

    Args:
        workload: what to run.
        device: of this process.
        dtype: "fp32", "bf16" or "fp16".
        batches: examples per device to time.
        time_budget: seconds, for everything.
        seed: of the model and the order of measurement.
        progress: called by process 0.

    Raises:
        UsageError: there is one process only.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 2:
        raise UsageError("one process alone has nobody to communicate with. Start several: torchrun --nproc-per-node N")
    tell = progress if progress is not None and rank == 0 else (lambda text, share: None)
    counts = sorted({2**i for i in range(1, world.bit_length()) if 2**i <= world} | {world})
    groups = {count: dist.new_group(list(range(count))) for count in counts}
    session = Session(workload, device, dtype, seed)
    bytes_ = sum(p.numel() * p.element_size() for p in session.parameters)
    points: list[DistributedPoint] = []
    reduces: list[AllReduce] = []
    start = time.monotonic()
    for i, count in enumerate(counts):
        tell(f"steps on {count} devices", i / len(counts))
        if rank < count:
            share = (start + time_budget * (i + 1) / len(counts)) - time.monotonic()
            team = _Team(session, groups[count], device, count)
            reduces += team.reduces(sorted({*_REDUCE_BYTES, bytes_}))
            points += team.steps(batches, max(1.0, share), seed)
        dist.barrier()
    notes = [Note("distributed.fit", f"beyond {world} devices step times are modelled, not measured")]
    if device.type == "cpu":
        text = "the processes share this machine's cores and memory: as on one busy node, not as on several"
        notes.append(Note("distributed.points", text))
    fit = fit_communication(points, reduces, bytes_) if rank == 0 else None
    return Distributed(world, dist.get_backend(), tuple(points), fit, tuple(notes))


class _Team:
    """The first `count` processes, working together."""

    def __init__(self, session: Session, group: Any, device: torch.device, count: int) -> None:
        self.session, self.group, self.device, self.count = session, group, device, count
        self.clock = clock_for(device)
        plain = session.model
        for value in (*plain.parameters(), *plain.buffers()):
            dist.broadcast(value.detach(), 0, group)
        ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(plain, device_ids=ids, process_group=group)
        self.optimizer = session.optimizer(still=True)  # every batch size meets the same model

    def reduces(self, sizes: Sequence[int]) -> list[AllReduce]:
        """Median time of an all-reduce of each size, in bytes."""
        found = []
        for size in sizes:
            data = torch.ones(max(1, size // 4), device=self.device)
            reduce = partial(dist.all_reduce, data, group=self.group)
            self._together(reduce, 2)
            seconds = self._together(reduce, _REDUCES)
            found.append(AllReduce(self.count, 4 * data.numel(), float(np.median(seconds))))
        return found

    def steps(self, batches: Sequence[int], budget: float, seed: int) -> list[DistributedPoint]:
        """Steps with and without communication at each batch per device, visited in random order."""
        plain = self.session.model
        self.session.model = self.model
        try:
            return self._steps(batches, budget, seed)
        finally:
            self.session.model = plain
            self.optimizer.zero_grad(set_to_none=True)

    def _steps(self, batches: Sequence[int], budget: float, seed: int) -> list[DistributedPoint]:
        kinds = [(batch, sync) for batch in batches for sync in (True, False)]
        times: dict[tuple[int, bool], list[float]] = {kind: [] for kind in kinds}
        quantum = budget / (len(kinds) * _VISITS) / 2  # half: warm-up, drawing and waiting take the rest
        order = np.random.default_rng(seed)
        for _ in range(_VISITS):
            for i in order.permutation(len(kinds)):
                batch, sync = kinds[i]
                drawn = Reused(self.session.timed_batch(batch))
                step = self._step(drawn, sync)
                warm = float(np.median(self._together(step, 2)))
                times[kinds[i]] += self._together(step, max(_LEAST_STEPS, min(200, int(quantum / warm))))
        points = []
        for batch in batches:
            step_time = median(times[batch, True])
            points.append(
                DistributedPoint(
                    devices=self.count,
                    batch=batch,
                    compute_ms=1e3 * median(times[batch, False]).value,
                    step_ms=1e3 * step_time.value,
                    step_ms_low=None if step_time.low is None else 1e3 * step_time.low,
                    step_ms_high=None if step_time.high is None else 1e3 * step_time.high,
                )
            )
        return points

    def _step(self, batch: Reused, sync: bool) -> Any:
        def step() -> None:
            with nullcontext() if sync else self.model.no_sync():
                self.optimizer.zero_grad(set_to_none=True)
                self.session.backward(batch.get())
                self.session.update(self.optimizer)

        return step

    def _together(self, work: Any, count: int) -> list[float]:
        """Seconds of each call, of the slowest process; `count` is process 0's, as clocks differ."""
        agreed = torch.tensor([count], device=self.device)
        dist.broadcast(agreed, 0, self.group)
        dist.barrier(self.group)
        seconds = torch.tensor(self.clock.time(work, int(agreed)), dtype=torch.float64, device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=self.group)
        return seconds.tolist()
