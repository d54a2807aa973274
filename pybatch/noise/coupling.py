"""Whether a loss is what a noise scale takes it for: a mean over examples, each of which counts by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from pybatch.base.errors import WorkloadError
from pybatch.device.generators import forked
from pybatch.noise.labels import ignored_in, ragged
from pybatch.noise.loss import COUPLED
from pybatch.noise.per_example.formed import dense
from pybatch.records import Note
from pybatch.workloads.running.session import Session

PARTS = 3  # examples looked at: with two, those of a mean over tokens are more often of one length
SUMMED = Note(
    "noise.loss",
    "the loss is a sum over the examples of a batch: its gradient grows with the batch, so the scale is distorted, and "
    "predicts no critical batch. Take the mean over examples",
)
APART = 0.05  # relative difference of gradients from which on examples are coupled; rounding of bf16 makes less


def coupling(session: Session) -> tuple[Note, ...]:
    """What to say of the workload's loss, from the gradients of a few examples, together and one by one.

    In evaluation mode, where neither dropout nor batch statistics make a difference. Gradients are left as None.
    """
    state = session.generator.get_state()
    batch, weights = session.weighed_batch(PARTS)
    session.generator.set_state(state)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not all(leaf.ndim and len(leaf) == PARTS for leaf in tensors):
        return ()  # a part has nothing to be cut out by
    share = [1.0 / PARTS] * PARTS if weights is None else (weights / weights.sum()).tolist()
    training = session.model.training
    session.model.eval()
    try:
        with forked(session.device):
            apart, from_sum, size = _apart(session, batch, share)
    except WorkloadError:
        return ()  # a loss that one example does not have
    finally:
        session.model.train(training)
        session.model.zero_grad()
    if not math.isfinite(apart) or apart <= APART * size:
        return ()
    if weights is None and ignored_in(batch):
        return (ragged("the workload's example_weights(batch)"),)
    return (SUMMED if from_sum <= APART * size else COUPLED,)


def _apart(session: Session, batch: Any, share: list[float]) -> tuple[float, float, float]:
    """Norms of the gradient of all less the mean of single ones, less their sum, and of what does not cancel in it."""
    together = _gradient(session, batch)
    size, mean, total = float(together.norm()), torch.zeros_like(together), torch.zeros_like(together)
    for i, part in enumerate(share):
        if part:
            own = _gradient(session, _part(batch, i))
            size = max(size, part * float(own.norm()))
            mean += part * own
            total += own
    return float((together - mean).norm()), float((together - total).norm()), size


def _part(batch: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, torch.Tensor) else leaf, batch)


def _gradient(session: Session, batch: Any) -> torch.Tensor:
    session.model.zero_grad()
    session.backward(batch)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in session.parameters]
    return torch.cat([dense(g.detach()).float().flatten() for g in grads])
