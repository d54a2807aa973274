"""Distributed runs: each process measures, and computes the same from float64 gradients of all processes' examples.

Every case returns plain numbers; the tests in tests/noise/test_distributed.py judge them.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo  # which torch's optimizers import
import torch.distributed as dist
from cases.noise_models import (
    Uphill,
    example_gradients,
    expected,
    images,
    loss_of,
    masked_gradients,
    mlp,
    watch_dropout,
)
from cases.paths import ROOT
from cases.watch_together import ddp_watched, fsdp_watched
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.fits.noise import pair


def batch(step, rank, n):
    """The same examples in every process that asks for them."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 * step + rank)
        return images(n)


def ddp(model, **options):
    torch.manual_seed(0)
    return DistributedDataParallel(model, **options)


def numbers(noise):
    return {
        "grad_sq": noise.grad_sq,
        "trace": noise.trace,
        "steps": noise.steps,
        "skipped": noise.skipped,
        "small": noise.small_batch,
        "large": noise.large_batch,
        "layers": {layer.name: [layer.grad_sq, layer.trace] for layer in noise.layers},
        "notes": [n.text for n in noise.notes],
    }


def mean_pairs(pairs):
    grad_sq, trace = (torch.stack([p[i] for p in pairs]).mean(0) for i in (0, 1))
    return grad_sq, trace


def seeded(make=mlp):
    torch.manual_seed(7)
    return make()


def plain(rank, world):
    """Unequal batches; only process 0 reads, in the middle too."""
    model = ddp(seeded(), bucket_cap_mb=0.0005)  # several buckets
    alone = ddp(seeded())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, alone)]
    handle = pybatch.noise.attach(model, optimizers[0], layers=True)
    truth = []
    for step in range(4):
        batches = [batch(step, r, 3 + r) for r in range(world)]
        found = [example_gradients(model.module, *b) for b in batches]
        truth.append(expected([f[0] for f in found]))
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            x, y = batches[rank]
            loss_of(m(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and step == 1:
            _ = handle.noise
    grad_sq, trace = mean_pairs(truth)
    widths = found[0][1]
    names = [name for name, _ in model.module.named_parameters()]
    layers = {
        name: [float(g.sum()), float(t.sum())]
        for name, g, t in zip(names, grad_sq.split(widths), trace.split(widths), strict=True)
    }
    drift = max(
        float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )
    want = {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum()), "layers": layers, "drift": drift}
    return numbers(handle.noise), want


def weighted(rank, world):
    """Each process weights its loss by its share of the examples."""
    model = ddp(seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = pybatch.noise.attach(model, optimizer, accumulation="weighted", examples="count")
    truth = []
    for step in range(3):
        batches = [batch(step, r, 2 + 3 * r) for r in range(world)]
        truth.append(expected([example_gradients(model.module, *b)[0] for b in batches], weighted=True))
        x, y = batches[rank]
        handle.count(len(y))
        (loss_of(model(x), y) * len(y) * world / sum(len(b[1]) for b in batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    grad_sq, trace = mean_pairs(truth)
    return numbers(handle.noise), {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum())}


def local_truth(model, micro):
    """The pair of one step with accumulation: micro[rank] are that process's micro-batches, equally weighted."""
    means = [torch.stack([example_gradients(model, *b)[0].mean(0) for b in own]).mean(0) for own in micro]
    sizes = [len(own) ** 2 / sum(1 / len(b[1]) for b in own) for own in micro]
    members = len(micro)
    n_small = members / sum(1 / n for n in sizes)
    means = torch.stack(means)
    small, large = means.square().sum(1).mean(), means.mean(0).square().sum()
    return [float(v) for v in pair(small, large, n_small, members * n_small)]


def no_sync(rank, world):
    """Two micro-batches accumulated in each process before the all-reduce."""
    model = ddp(seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = pybatch.noise.attach(model, optimizer)
    truth = []
    for step in range(3):
        micro = [[batch(step, 10 * r, 2 + r), batch(step, 10 * r + 1, 3)] for r in range(world)]
        truth.append(local_truth(model.module, micro))
        with model.no_sync():
            (loss_of(model(micro[rank][0][0]), micro[rank][0][1]) / 2).backward()
        (loss_of(model(micro[rank][1][0]), micro[rank][1][1]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    grad_sq, trace = torch.tensor(truth).mean(0).tolist()
    return numbers(handle.noise), {"grad_sq": grad_sq, "trace": trace}


def synchronized_twice(rank, world):
    """Accumulation without no_sync: the second backward pass of a step is not a draw of its own."""
    model = ddp(seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = pybatch.noise.attach(model, optimizer)
    truth = []
    for step in range(2):
        batches = [batch(step, r, 4) for r in range(world)]
        truth.append(expected([example_gradients(model.module, *b)[0] for b in batches]))
        for _ in range(2):
            x, y = batches[rank]
            loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    grad_sq, trace = mean_pairs(truth)
    return numbers(handle.noise), {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum())}


def own_hook(rank, world):
    """The user's compression runs inside; a hook registered before is refused; a handle can be replaced."""
    model, alone = ddp(seeded()), ddp(seeded())
    alone.register_comm_hook(None, fp16_compress_hook)
    refused = {}
    try:
        pybatch.noise.attach(alone)
    except UsageError as error:
        refused["registered"] = str(error)
    first = pybatch.noise.attach(model, hook=fp16_compress_hook)
    try:
        pybatch.noise.attach(model)
    except UsageError as error:
        refused["attached"] = str(error)
    first.detach()
    handle = pybatch.noise.attach(model)
    truth = []
    for step in range(2):
        batches = [batch(step, r, 4) for r in range(world)]
        truth.append(expected([example_gradients(model.module, *b)[0] for b in batches]))
        model.zero_grad()
        alone.zero_grad()
        for m in (model, alone):
            loss_of(m(batches[rank][0]), batches[rank][1]).backward()
    same = all(bool((a.grad == b.grad).all()) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    grad_sq, trace = mean_pairs(truth)
    want = {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum()), "same": same, "refused": refused}
    return numbers(handle.noise) | {"before": first.noise.steps}, want


def uneven(rank, world):
    """DDP's `join`: the last process runs out of batches first, and counts for nothing then."""
    model = ddp(seeded())
    handle = pybatch.noise.attach(model, examples=4)
    truth = []
    with model.join():
        for step in range(3):
            here = range(world) if step < 2 else range(world - 1)
            batches = [batch(step, r, 4) for r in range(world)]
            truth.append(
                expected([example_gradients(model.module, *batches[r])[0] for r in here]) if len(here) > 1 else None
            )
            if rank in here:
                model.zero_grad()
                loss_of(model(batches[rank][0]), batches[rank][1]).backward()
    grad_sq, trace = mean_pairs([t for t in truth if t is not None])
    return numbers(handle.noise), {
        "grad_sq": float(grad_sq.sum()),
        "trace": float(trace.sum()),
        "steps": sum(t is not None for t in truth),
    }


def preconditioned(rank, world):
    """G^T P G with Adam's P, in the buckets; and a step that is not finite on one process only."""
    model = ddp(seeded())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    handle = pybatch.noise.attach(model, optimizer, preconditioned=True)
    truth = []
    for step in range(3):
        batches = [batch(step, r, 4) for r in range(world)]
        if step:
            p = torch.cat(
                [
                    1 / ((optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999**step)).sqrt() + 1e-3).flatten()
                    for p in model.parameters()
                ]
            )
            grads = expected([example_gradients(model.module, *b)[0] for b in batches])
            truth.append([float((p * part).sum()) for part in grads])
        loss_of(model(batches[rank][0]), batches[rank][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = handle.noise.preconditioned
    (loss_of(model(batches[rank][0]), batches[rank][1]) * (float("inf") if rank == 1 else 1.0)).backward()
    optimizer.zero_grad()
    grad_sq, trace = torch.tensor(truth).mean(0).tolist()
    skipped = handle.noise.skipped
    return {"grad_sq": found.grad_sq, "trace": found.trace, "skipped": skipped}, {"grad_sq": grad_sq, "trace": trace}


def moments(rank, world):
    """Adam's moments are of the mean over processes; hooks on parameters would see a mixture, and are refused."""
    model = ddp(seeded())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    try:
        pybatch.noise.attach(model, optimizer, "micro-batches")
        refused = ""
    except UsageError as error:
        refused = str(error)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=2)
    for step in range(4):
        x, y = batch(step, rank, 5)
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return numbers(handle.noise), {"small": 5 * world, "refused": refused}


def sharded(make=mlp):
    model = seeded(make)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def fsdp(rank, world):
    """FSDP2 with unequal batches; layers are its groups; only process 0 reads in the middle."""
    model, whole = sharded(), seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = pybatch.noise.attach(model, optimizer, layers=True)
    truth = []
    for step in range(3):
        whole.load_state_dict({k: v.full_tensor() for k, v in model.state_dict().items()})
        batches = [batch(step, r, 3 + 2 * r) for r in range(world)]
        found = [example_gradients(whole, *b) for b in batches]
        truth.append(expected([f[0] for f in found]))
        loss_of(model(batches[rank][0]), batches[rank][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step == 1:
            _ = handle.noise
    grad_sq, trace = mean_pairs(truth)
    widths = found[0][1]
    cut = [sum(widths[:2]), sum(widths[2:])]
    layers = {
        name: [float(g.sum()), float(t.sum())]
        for name, g, t in zip(("1", "3"), grad_sq.split(cut), trace.split(cut), strict=True)
    }
    handle.detach()
    loss_of(model(batches[rank][0]), batches[rank][1]).backward()  # FSDP2's own way again
    state = handle.state_dict()
    other = pybatch.noise.attach(model, optimizer, layers=True)
    other.load_state_dict(state)
    want = {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum()), "layers": layers}
    return numbers(other.noise), want


def fsdp_accumulated(rank, world):
    """Without gradient sync the small batch is what accumulated; with it every backward pass is a pair of its own.

    The last of them is not finite on one process.
    """
    model, whole = sharded(), seeded()
    handle = pybatch.noise.attach(model)
    micro = [[batch(0, 10 * r, 2 + r), batch(0, 10 * r + 1, 3)] for r in range(world)]
    accumulated = local_truth(whole, micro)
    model.set_requires_gradient_sync(False)
    (loss_of(model(micro[rank][0][0]), micro[rank][0][1]) / 2).backward()
    model.set_requires_gradient_sync(True)
    (loss_of(model(micro[rank][1][0]), micro[rank][1][1]) / 2).backward()
    model.zero_grad()
    batches = [batch(1, r, 4) for r in range(world)]
    alone = [float(part.sum()) for part in expected([example_gradients(whole, *b)[0] for b in batches])]
    for _ in range(2):
        loss_of(model(batches[rank][0]), batches[rank][1]).backward()
    (loss_of(model(batches[rank][0]), batches[rank][1]) * (float("inf") if rank == 1 else 1.0)).backward()
    model.zero_grad()
    with torch.enable_grad():
        model(batches[rank][0])  # the next forward pass exchanges the last pair
    want = torch.tensor([accumulated, alone, alone]).mean(0).tolist()
    return numbers(handle.noise), {"grad_sq": want[0], "trace": want[1]}


def totals(truth):
    grad_sq, trace = mean_pairs(truth)
    return {"grad_sq": float(grad_sq.sum()), "trace": float(trace.sum())}


def state(model):
    """Whole parameters, by the names they have without a wrapper."""
    own = model.module if isinstance(model, DistributedDataParallel) else model
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in own.state_dict().items()}


def scaled(model, rank, world):
    """fp16 under a loss scale that overflows at first and grows again; gradients cleared either way."""
    whole = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=3)
    handle = pybatch.noise.attach(model, optimizer, scaler=scaler)
    truth, skipped = [], 0
    for step in range(12):
        before = state(model)
        whole.load_state_dict(before)
        batches = [batch(step, r, 3 + r) for r in range(world)]
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model(batches[rank][0]), batches[rank][1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        after = state(model)
        if any(not torch.equal(before[k], after[k]) for k in before):
            truth.append(expected([example_gradients(whole, *b)[0] for b in batches]))
        else:
            skipped += 1
    return numbers(handle.noise), totals(truth) | {"steps": len(truth), "skipped": skipped}


def ddp_scaled(rank, world):
    """A step that the scaler leaves out is not taken for a second synchronization of the next."""
    return scaled(ddp(seeded()), rank, world)


def fsdp_scaled(rank, world):
    """A step that is left out is exchanged at the next forward pass."""
    return scaled(sharded(), rank, world)


def dropping():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))


def dropout(model, rank, world, training):
    """Every process draws masks of its own, and the gradients as made with them are the sample."""
    whole = seeded(dropping)
    model.train(training)
    seen = watch_dropout(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    handle = pybatch.noise.attach(model, optimizer, examples="count")
    truth = {"own": [], "redrawn": [], "ignored": []}
    torch.manual_seed(100 + rank)
    for step in range(4):
        whole.load_state_dict(state(model))
        batches = [batch(step, r, 4 + r) for r in range(world)]
        x, y = batches[rank]
        handle.count(len(x))
        loss_of(model(x), y).backward()
        masks = [None] * world
        dist.all_gather_object(masks, {name.removeprefix("module."): value for name, value in seen.items()})
        ways = {"own": masks, "redrawn": [{k: m[k][torch.randperm(len(m[k]))] for k in m} for m in masks]}
        for way, used in ways.items():
            truth[way].append(expected([masked_gradients(whole, m, *b) for m, b in zip(used, batches, strict=True)]))
        truth["ignored"].append(expected([example_gradients(whole.eval(), *b)[0] for b in batches]))
        optimizer.step()
        optimizer.zero_grad()
    one, two = ({k: v[:4] for k, v in m.items()} for m in masks[:2])
    differ = any(not torch.equal(one[k], two[k]) for k in one)
    torch.manual_seed(0)
    found = {way: totals(pairs) for way, pairs in truth.items() if way != "redrawn"}
    return numbers(handle.noise), found | {"differ": differ, "redrawn": gathered(totals(truth["redrawn"]))}


def gathered(value):
    """That of process 0, in every process."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def ddp_dropout(rank, world):
    """In training mode."""
    return dropout(ddp(seeded(dropping)), rank, world, True)


def ddp_dropout_eval(rank, world):
    """In evaluation mode, where nothing is dropped."""
    return dropout(ddp(seeded(dropping)), rank, world, False)


def fsdp_dropout(rank, world):
    """In training mode."""
    return dropout(sharded(dropping), rank, world, True)


def fsdp_dropout_eval(rank, world):
    """In evaluation mode, where nothing is dropped."""
    return dropout(sharded(dropping), rank, world, False)


def twice(model, rank, world):
    """Steps that evaluate their closure a second time uphill, where it would measure something else."""
    optimizer = Uphill(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    truth = []
    for step in range(3):
        batches = [batch(step, r, 3 + r) for r in range(world)]
        alone = mlp()
        alone.load_state_dict(state(model))
        truth.append(expected([example_gradients(alone, *b)[0] for b in batches]))
        x, y = batches[rank]

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return numbers(handle.noise), totals(truth) | {"steps": 3}


def ddp_closure(rank, world):
    """Every evaluation synchronizes, the first alone is measured."""
    return twice(ddp(seeded()), rank, world)


def fsdp_closure(rank, world):
    """The same under FSDP2."""
    return twice(sharded(), rank, world)


def example(rank, world, *more):
    """examples/several_devices.py in this group: what it prints, which the first process does."""
    begin, end, typed = dist.init_process_group, dist.destroy_process_group, sys.argv
    dist.init_process_group = dist.destroy_process_group = lambda *given: None
    sys.argv = ["several_devices.py", "--steps", "40", *more]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(ROOT / "examples" / "several_devices.py"), run_name="__main__")
    finally:
        dist.init_process_group, dist.destroy_process_group, sys.argv = begin, end, typed
    assert rank == 0 or said.getvalue() == ""
    return gathered(said.getvalue())


def ddp_example(rank, world):
    """As it is."""
    return example(rank, world)


def fsdp_example(rank, world):
    """With --fsdp."""
    return example(rank, world, "--fsdp")


DDP_CASES = (
    *(plain, weighted, no_sync, synchronized_twice, own_hook, uneven, preconditioned, moments),
    *(ddp_scaled, ddp_dropout, ddp_dropout_eval, ddp_closure),
)
FSDP_CASES = (fsdp, fsdp_accumulated, fsdp_scaled, fsdp_dropout, fsdp_dropout_eval, fsdp_closure)
WATCH_CASES = (ddp_watched, fsdp_watched)
EXAMPLES = (ddp_example, fsdp_example)


def main(rank, world, folder):
    """Run the cases and write what each found and wanted."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    cases = DDP_CASES + FSDP_CASES + WATCH_CASES + EXAMPLES if world == 2 else DDP_CASES
    found = {case.__name__: case(rank, world) for case in cases}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    gc.collect()  # models and their reducers go before the group they use
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's own threads can abort the interpreter on its way out; all results are written by now.
    sys.stderr.flush()
    os._exit(0)


def started(world, folder):
    """Processes of one run, which have imported torch before they part."""
    folder.mkdir()
    for rank in range(world):
        if not (child := os.fork()):
            try:
                main(rank, world, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        yield child


if __name__ == "__main__":
    *worlds, place = sys.argv[1:]
    for world in worlds:
        running = list(started(int(world), Path(place, world)))
        while running:  # the first that fails ends the others, which wait for it
            child, failed = os.wait()
            running.remove(child)
            if failed:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a process of {world} failed")
