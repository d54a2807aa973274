"""Trainings of several processes under observation; run by noise_worker.py."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pybatch.jobs.options import WatchOptions
from pybatch.jobs.watch import Watching
from pybatch.records import Ceilings
from pybatch.watch import replay


def made(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model[0])
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, rank, steps, generator):
    for _ in range(steps):
        x = torch.randn(4 + 2 * rank, 6, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


def end(kind, rank, watched):
    """The weights after the training has gone on, and the run."""
    model, optimizer = made(kind)
    generator, run = torch.Generator().manual_seed(rank), None
    if watched:
        watching = Watching(WatchOptions(time_budget=0.3))
        watching.start()
    train(model, optimizer, rank, 24, generator)
    if watched:
        run = watching.finish()
        assert watching.fault is None, watching.fault
    train(model, optimizer, rank, 3, generator)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), run


def watched(kind, rank):
    replay.measure_ceilings = lambda *given: Ceilings(1e11, 1e10)
    plain, _ = end(kind, rank, False)
    weights, run = end(kind, rank, True)
    return {
        "same": torch.equal(plain, weights),
        "source": run.noise.source,
        "pairs": run.noise.steps,
        "devices": run.training.devices,
        "found": run.training.wrapped,
        "batches": [p.batch for p in run.capacity.batches],
        "step_ms": [p.step_ms for p in run.capacity.batches],
        "device": run.capacity.device.name,
    }


def ddp_watched(rank, world):
    return watched("ddp", rank), None


def fsdp_watched(rank, world):
    return watched("fsdp", rank), None
