"""accelerate: the noise scale of a loop under an Accelerator, logged by its trackers; and its parts as a workload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from pybatch.base.errors import UsageError
from pybatch.integrations.figures import groups_by_place, logged, made_again
from pybatch.noise import attach
from pybatch.records import NoiseScale
from pybatch.workloads.base import Workload


class NoiseLog:
    """The noise scale of a training loop under an Accelerator.

    Args:
        accelerator: whose trackers log; without any, nothing is logged and `noise` is there to be read.
        model, optimizer: as `accelerator.prepare` returned them.
        every: steps between two readings, each of which waits for the device.
        attached: further arguments of `pybatch.noise.attach`.
    """

    def __init__(
        self,
        accelerator: Any,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 50,
        **attached: Any,
    ) -> None:
        if every < 1:
            raise UsageError(f"every {every}: give the steps between readings, 1 or more.")
        self.accelerator, self.every = accelerator, every
        self.handle = attach(model, optimizer, **attached)

    @property
    def noise(self) -> NoiseScale:
        """The noise scale so far."""
        return self.handle.noise

    def step(self, step: int) -> NoiseScale | None:
        """To be called after each optimizer step, with its number; the noise scale where it was read and logged."""
        if step % self.every:
            return None
        found = self.noise
        self.accelerator.log(logged(found), step=step)
        return found

    def end(self) -> None:
        """Take the hooks off the model."""
        self.handle.detach()


def workload(
    accelerator: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: torch.utils.data.DataLoader[Any],
    loss: Callable[..., torch.Tensor],
    **more: Any,
) -> Workload:
    """A workload of what `accelerator.prepare` returned, for `pybatch.measure_capacity` and all others.

    Args:
        accelerator: that prepared them.
        model: its weights now are where every training begins.
        optimizer: whose class and groups a training of the workload has.
        loader: of training batches; its data set, collate_fn and workers are taken.
        loss: of (model, batch), or a criterion, as for `Workload.from_parts`.
        more: `test`, `name`, `unit`, ...: as for `Workload.from_parts`.
    """
    plain = accelerator.unwrap_model(model)
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = groups_by_place(inner, [p for p in plain.parameters() if p.requires_grad])
    kind, defaults = type(inner), copy.deepcopy(inner.defaults)
    size = int(getattr(loader, "total_batch_size", None) or loader.batch_size or Workload.reference_batch)
    return Workload.from_parts(
        model=plain,
        train=loader.dataset,
        collate_fn=loader.collate_fn,
        loss=loss,
        optimizer=lambda params: made_again(kind, defaults, groups, params),
        num_workers=loader.num_workers,
        **{"reference_batch": size * accelerator.gradient_accumulation_steps, **more},
    )
