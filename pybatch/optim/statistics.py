"""The noise statistics of an optimizer: read, named, saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from pybatch import ops
from pybatch.noise import estimator
from pybatch.optim.tables import Groups, Tables
from pybatch.records import LayerNoise, NoiseScale

SOURCE = "micro-batches"


def names(groups: Groups) -> list[str]:
    """Names of all parameters: the user's, or the index over all groups."""
    given = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    return [str(i) if name is None else name for i, name in enumerate(given)]


def noise(ledger: ops.Ledger | None, tables: Tables | None, named: list[str], single: int) -> NoiseScale:
    """The noise scale in total and by parameter; waits for the device.

    Args:
        ledger, tables: of the optimizer; None before its first gradient.
        named: names of all parameters.
        single: steps of one micro-batch, which give no pair of norms.
    """
    if ledger is None:
        return estimator.estimate(np.zeros((0, 3)), source=SOURCE, single=single)
    pairs = float(ledger["pairs"])
    total = estimator.estimate(
        ledger.ring.cpu().numpy(),
        source=SOURCE,
        small_batch=float(ledger["small_sum"]) / pairs if pairs else None,
        large_batch=float(ledger["large_sum"]) / pairs if pairs else None,
        skipped=int(ledger["skipped"]),
        single=single,
    )
    return dataclasses.replace(total, layers=_layers(tables, named))


def _layers(tables: Tables | None, named: list[str]) -> tuple[LayerNoise, ...]:
    """One entry for each parameter that has had a pair of norms."""
    if tables is None or tables.first is None or tables.first.layers is None:
        return ()
    rings = tables.first.layers[:, ops.LAYER_SUMS :].cpu().numpy()
    found = []
    for slot, ring in zip(tables.slots, rings, strict=True):
        own = estimator.estimate(ring.reshape(-1, 3), source=SOURCE)
        if own.grad_sq is not None and own.trace is not None:
            found.append(LayerNoise(named[slot.index], own.b_simple, own.grad_sq, own.trace))
    return tuple(found)


def save(ledger: ops.Ledger, tables: Tables | None) -> dict[str, Any]:
    """For a state_dict: the ledger, and the statistics of single parameters with their indices."""
    state: dict[str, Any] = dict(ledger.state_dict())
    if tables is not None and tables.first is not None and tables.first.layers is not None:
        layers = tables.first.layers.clone()
        layers[:, : ops.LAYER_SUMS] = 0.0  # of a step under way
        state |= {"layers": layers, "layer_indices": [slot.index for slot in tables.slots]}
    return state


def load(saved: dict[str, Any]) -> tuple[ops.Ledger, dict[int, torch.Tensor]]:
    """The ledger and the statistics by index of parameter that `save` gave."""
    ledger = ops.Ledger(saved["ledger"].device)
    ledger.load_state_dict(saved)
    return ledger, dict(zip(saved.get("layer_indices", []), saved.get("layers", []), strict=True))
