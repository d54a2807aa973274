"""`attach`: measure the noise scale of a training run that is the user's own, by whatever its model offers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.base.plain import given
from pybatch.noise.handle import ACCUMULATIONS, Accumulation, Examples, Handle
from pybatch.noise.ordinary import OrdinaryLoop, offers
from pybatch.noise.preconditioner import EXPERIMENTAL
from pybatch.noise.sources.adam_moments import MomentsNoise
from pybatch.noise.sources.ddp import DDPNoise
from pybatch.noise.sources.examples import ExampleNoise
from pybatch.noise.sources.fsdp import FSDPNoise
from pybatch.noise.sources.fused import FusedLoop, OptimizerNoise
from pybatch.noise.sources.micro_batches import MicroBatchNoise
from pybatch.optim import FusedOptimizer
from pybatch.records import Note

NoiseSource = Literal["micro-batches", "ddp", "fsdp", "adam-moments", "per-example"]

SOURCES = ("micro-batches", "ddp", "fsdp", "adam-moments", "per-example")
COUNTED = Note(
    "noise.b_simple", "examples were counted along dimension 0 of the first tensor given to the model's forward()"
)


@typed
def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    source: NoiseSource | None = None,
    *,
    examples: Examples = None,
    accumulation: Accumulation = "mean",
    layers: bool = False,
    preconditioned: bool = False,
    unit: str | None = None,
    scaler: Any = None,
    hook: Any = None,
    hook_state: Any = None,
    every: int | None = None,
) -> Handle:
    """Measure the gradient noise scale of a training run; `.noise` of the handle reads it, `.detach()` ends it.

    Call it after wrapping the model and before training. Nothing waits for the device until `.noise` is read. In a
    distributed run every process attaches, and any of them may read.

    Args:
        model: what is trained: plain, wrapped in DistributedDataParallel, or sharded by `fully_shard` (FSDP2).
        optimizer: the one whose step() is called, or a trainer's wrapper of it. Needed by "micro-batches" and
            "adam-moments"; lets "ddp" and "fsdp" know steps, of which the first evaluation alone is measured where
            `step(closure)` makes more (LBFGS, SAM).
        source: where the norms come from; None chooses by the model: "ddp" or "fsdp" over two or more processes, else
            "micro-batches" (two or more backward passes per step; a fused optimizer made with noise=True takes these
            norms itself in `opt.accumulate(n)`, and its handle reads `opt.noise`; where its first step comes without,
            as trainers make it, it is measured as any other). Where the first steps then have one
            backward pass each, "per-example" takes over (exact norms of each example's gradient, where all layers are
            known and the loss is a mean over the examples), else "adam-moments"; a warning names the remedies where
            neither can be had.
        examples: None: each forward pass in training mode counts dimension 0 of its first tensor. A number: that many
            each. "count": call `handle.count(n)` before every backward(), with tokens where the loss is a mean over
            tokens.
        accumulation: how micro-batch losses (each a mean) make up a step. "mean": each is divided by their number, as
            is usual. "sum": they are not divided. "weighted": each is weighted by its share of the step's examples or
            tokens, over all processes.
        layers: record every parameter too; under FSDP2 every `fully_shard` group.
        preconditioned: record tr(P Sigma) / (G^T P G) with Adam's P too: experimental, one more pass over gradients.
        unit: what is counted, where it is not examples, such as "tokens"; `.noise.in_examples(mean tokens per example)`
            is what a batch size is compared with.
        scaler: the GradScaler in use, so that norms are unscaled. With it a fused optimizer is measured as any other:
            let gradients add up in `.grad`, which a scaler needs, in place of opt.accumulate(n).
        hook, hook_state: a DDP communication hook of your own and its state, such as `bf16_compress_hook` and the
            process group; for FSDP2 a custom reduce-scatter. It is called in place of the plain one.
        every: "adam-moments": steps between readings; None: 3 / (1 - beta1). "per-example" and
            "micro-batches": steps from one that is watched to the next; None: 10 and 1.

    Raises:
        UsageError: an argument out of range, or a source that this model or optimizer can't give.
    """
    if source is not None and source not in SOURCES:
        raise UsageError(f"source {source!r} is not known. Use one of: {', '.join(SOURCES)}, or None.")
    if accumulation not in ACCUMULATIONS:
        raise UsageError(f"accumulation {accumulation!r} is not known. Use one of: {', '.join(ACCUMULATIONS)}.")
    optimizer, scaler = _unwrapped(optimizer, scaler)
    _check(model, optimizer)
    devices = sorted({str(param.device) for param in model.parameters() if param.requires_grad})
    if len(devices) > 1:
        raise UsageError(f"attach(): the model's parameters are on {', '.join(devices)}. Attach to one on one device.")
    chosen, source = source is not None, source or _choose(model)
    notes = (COUNTED,) if examples is None else ()
    if preconditioned:
        notes = (*notes, EXPERIMENTAL)
    common: dict[str, Any] = {
        "layers": layers,
        "examples": examples,
        "accumulation": accumulation,
        "unit": unit,
        "notes": notes,
    }
    if hook is not None and source not in ("ddp", "fsdp"):
        raise UsageError(f"hook: the source {source!r} has no communication to hook into. Leave it out.")
    if hook_state is not None and (hook is None or source != "ddp"):
        raise UsageError("hook_state: it is handed to a communication hook of DDP. Give hook=... too, or leave it out.")
    if every is not None and (source in ("ddp", "fsdp") or not chosen):
        raise UsageError(f"every={every}: the source {source!r} takes every step. Leave it out, or name another.")
    if every is not None and every < 1:
        raise UsageError(
            f"every={every!r}: give the steps from one that is watched to the next, a whole number from 1."
        )
    if scaler is not None and source == "adam-moments":
        raise UsageError("scaler: the moments of source 'adam-moments' are of unscaled gradients. Leave it out.")
    if source == "ddp":
        if not isinstance(model, DistributedDataParallel):
            raise UsageError(
                f"source 'ddp': {type(model).__name__} is not wrapped in DistributedDataParallel. Wrap it."
            )
        more = {"preconditioned": preconditioned, "scaler": scaler, "hook": hook, "hook_state": hook_state}
        return DDPNoise(model, optimizer, **common, **more)
    if source == "fsdp":
        if not isinstance(model, FSDPModule):
            raise UsageError(f"source 'fsdp': {type(model).__name__} is not sharded. Call fully_shard(model) before.")
        more = {"preconditioned": preconditioned, "scaler": scaler, "hook": hook}
        return FSDPNoise(model, optimizer, **common, **more)
    if optimizer is None:
        raise UsageError(f"source {source!r} needs the optimizer. Pass attach(model, optimizer, ...).")
    if source == "adam-moments":
        if preconditioned:
            raise UsageError("source 'adam-moments' has no preconditioned norms. Use another source, or leave it out.")
        return MomentsNoise(model, optimizer, **common, every=every)
    _refuse_reduced(model, source)
    if source == "per-example":
        if preconditioned:
            raise UsageError("source 'per-example' has no preconditioned norms. Use another source, or leave it out.")
        return ExampleNoise(model, optimizer, **common, scaler=scaler, every=every)
    micro = partial(
        MicroBatchNoise, model, optimizer, **common, preconditioned=preconditioned, scaler=scaler, every=every
    )
    ordinary = partial(OrdinaryLoop, model=model, offers=offers(model, optimizer, common, scaler))

    def other() -> tuple[Handle, Callable[..., None]]:
        source = micro()
        return ordinary(source), source.begin

    # A GradScaler looks for infinities in `.grad`, so opt.accumulate() can't be used with one; hooks can.
    if isinstance(optimizer, FusedOptimizer) and optimizer.measures and scaler is None:
        given: dict[str, Any] = {"examples": examples, "preconditioned": preconditioned or None, "every": every}
        given["accumulation"] = accumulation if accumulation != "mean" else None
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            raise UsageError(
                f"attach(): {', '.join(ignored)} can't be given with a fused optimizer, which takes the norms itself "
                "and counts in opt.accumulate(n). Leave them out, or use an optimizer of torch; with a GradScaler give "
                "scaler=..., and gradients are measured as they add up in .grad."
            )
        return FusedLoop(OptimizerNoise(optimizer, unit), model, optimizer, other)
    return micro() if chosen or preconditioned else ordinary(micro())


def _check(model: object, optimizer: object) -> None:
    """UsageError for what is no module, or no optimizer: a class, a name, both in each other's place."""
    updates = optimizer is None or hasattr(optimizer, "param_groups")  # some sources need none
    for name, value, good, kind in (
        ("model", model, isinstance(model, nn.Module), "nn.Module that is trained"),
        ("optimizer", optimizer, updates, "optimizer of its parameters"),
    ):
        if not good or isinstance(value, type):
            raise UsageError(f"attach(): {name} is {given(value)}. Give the {kind}: attach(model, optimizer).")


def _unwrapped(optimizer: Any, scaler: Any) -> tuple[Any, Any]:
    """The optimizer that a trainer's own (accelerate's, Lightning's) hands its steps to, and the scaler it goes by."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        scaler = scaler if scaler is not None else getattr(optimizer, "scaler", None)
        optimizer = inner
    return optimizer, scaler


def _refuse_reduced(model: nn.Module, source: str) -> None:
    """Hooks on parameters see gradients before processes are averaged, and `.grad` after: no pair of norms."""
    if isinstance(model, FSDPModule) or (
        isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1
    ):
        own = "fsdp" if isinstance(model, FSDPModule) else "ddp"
        raise UsageError(
            f"source {source!r}: the gradients of this model are averaged over processes within the backward pass, "
            f"where micro-batches of one process are mixed with the others'. Use source {own!r}, or None."
        )


def _choose(model: nn.Module) -> NoiseSource:
    if isinstance(model, FSDPModule):
        return "fsdp"
    if isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1:
        return "ddp"
    return "micro-batches"
