"""The noise statistics of an optimizer: read, named, saved."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.fits import noise as estimator
from pybatch.fits import stretch
from pybatch.optim._engine.hyper import Groups
from pybatch.records import LayerNoise, NoiseScale

SOURCE = "micro-batches"
STATE = "noise_statistics"  # its name among the states of a parameter
Layers = Mapping[int, torch.Tensor]


def names(groups: Groups) -> list[str]:
    """Names of all parameters: the user's, or the index over all groups."""
    given = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    return [str(i) if name is None else name for i, name in enumerate(given)]


def noise(
    ledger: ops.Ledger | None, layers: Layers, named: list[str], single: int, *, whole: bool = False
) -> NoiseScale:
    """The noise scale in total and by parameter; waits for the device.

    Args:
        ledger: the optimizer's; None before its first gradient.
        layers: float64 [ops.LAYER_SIZE] by index of parameter.
        named: names of all parameters.
        single: steps of one micro-batch, which give no pair of norms.
        whole: of all steps as one; else of the newest stretch that gives an interval, with the run as trajectory.
    """
    if ledger is None:
        return estimator.estimate(np.zeros((0, 3)), source=SOURCE, single=single)
    pairs, length = float(ledger["pairs"]), round(float(ledger["ring_length"]))
    steps = round(float(ledger["ring_steps"]))
    rows = ledger.ring[: -(-steps // length)].cpu().numpy()
    small = float(ledger["small_sum"]) / pairs if pairs else None
    first = 0 if whole else stretch.newest(rows, small)
    start = first * length + 1
    total = estimator.estimate(
        rows[first:],
        source=SOURCE,
        small_batch=small,
        large_batch=float(ledger["large_sum"]) / pairs if pairs else None,
        skipped=int(ledger["skipped"]),
        single=single,
        notes=() if whole else stretch.drift_note(rows[first:]),
    )
    total = dataclasses.replace(
        total, layers=_entries(layers, named, small, first / len(ledger.ring), len(rows) / len(ledger.ring))
    )
    if whole or not steps:
        return total
    run = stretch.trajectory(rows, length, steps)
    return dataclasses.replace(total, first_step=start, last_step=steps, trajectory=run)


def _entries(
    layers: Layers, named: list[str], small_batch: float | None, first: float, used: float
) -> tuple[LayerNoise, ...]:
    """One entry for each parameter that has had a pair of norms; both shares are of a full ring."""
    if not layers:
        return ()
    rings = torch.stack([layers[index][ops.LAYER_SUMS :] for index in sorted(layers)]).cpu().numpy()
    blocks = rings.reshape(len(rings), -1, 3)
    own = math.ceil(used * blocks.shape[1])
    start = stretch.coarse(int(first * blocks.shape[1]), own)
    found = estimator.estimate_layers([named[index] for index in sorted(layers)], blocks[:, start:own], small_batch)
    return tuple(layer for layer in found if layer.grad_sq is not None)


def packed(ledger: ops.Ledger, layers: Layers, count: int, single: int, seed: int) -> torch.Tensor:
    """All of it as one tensor for a checkpoint, float64 on the ledger's device, of a size that `count` decides.

    Args:
        ledger, layers: as of `noise`.
        count: parameters of the optimizer.
        single: steps of one micro-batch.
        seed: of random bits, below 2**63.
    """
    saved = ledger.state_dict()
    device = saved["ledger"].device
    rows = torch.zeros(count, ops.LAYER_SIZE, dtype=torch.float64, device=device)
    for index, row in layers.items():
        rows[index] = row
    rows[:, : ops.LAYER_SUMS] = 0.0  # of a step under way
    head = [single, seed >> 32, seed & 0xFFFFFFFF]
    numbers = torch.tensor(head, dtype=torch.float64, device=device)
    return torch.cat([numbers, saved["ledger"], saved["ring"].flatten(), rows.flatten()])


def unpacked(saved: torch.Tensor) -> tuple[ops.Ledger, dict[int, torch.Tensor], int, int]:
    """The ledger, the statistics of single parameters by index, steps of one micro-batch, and the seed.

    Raises:
        UsageError: they are another version's.
    """
    ledger = ops.Ledger(saved.device)
    sizes = [3, ledger.values.numel(), ledger.ring.numel()]
    rest = saved.numel() - sum(sizes)
    if saved.dtype != torch.float64 or saved.ndim != 1 or rest < 0 or rest % ops.LAYER_SIZE:
        raise UsageError(
            f"the state {STATE!r} has shape {tuple(saved.shape)} in {saved.dtype}, which is another version's. Delete "
            "it from the state_dict to load the rest."
        )
    ends = list(itertools.accumulate(sizes))
    numbers, values, ring, rows = (part.clone() for part in torch.tensor_split(saved, ends))
    ledger.load_state_dict({"ledger": values, "ring": ring.reshape(ledger.ring.shape)})
    layers = {i: row for i, row in enumerate(rows.reshape(-1, ops.LAYER_SIZE)) if row.any()}
    single, high, low = (int(number) for number in numbers)
    return ledger, layers, single, high << 32 | low
