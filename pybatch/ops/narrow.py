"""States in 8 bits, as kernels/narrow.h keeps them: codes of blocks, and a scale for each block."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from pybatch.ops.compiled import STATE_BLOCK, core


def scale_count(elements: int) -> int:
    """Blocks that have a scale of their own."""
    return -(-elements // STATE_BLOCK)


def to_codes(values: torch.Tensor, *, has_sign: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes nearest to a state's values: uint8 of the same layout, and fp32 [blocks] scales.

    Values that `from_codes` gave come back to their codes.

    Args:
        values: dense fp32, in whatever order of dimensions; blocks follow its memory.
        has_sign: whether the state can be negative.
    """
    flat = _in_memory(values)
    blocks = functional.pad(flat, (0, -len(flat) % STATE_BLOCK)).view(-1, STATE_BLOCK)
    scales = blocks.abs().amax(1) if len(blocks) else flat.new_zeros(0)
    usable = torch.where(scales > 0, scales, 1.0)
    order, bounds = (table.to(values.device) for table in _tables(has_sign))
    shares = (blocks / usable[:, None]).reshape(-1)[: len(flat)]
    places = torch.bucketize(shares.nan_to_num(0.0).contiguous(), bounds)
    if not has_sign:  # what is not 0 does not become 0: steps divide by it
        places = places.clamp_min(1).where(flat > 0, 0)
    codes = torch.empty_like(values, dtype=torch.uint8)
    _in_memory(codes).copy_(order[places])
    return codes, scales


def from_codes(codes: torch.Tensor, scales: torch.Tensor, *, has_sign: bool) -> torch.Tensor:
    """The fp32 values that codes stand for, in their layout."""
    flat = _in_memory(codes)
    table = torch.tensor(core.state_codes[has_sign], dtype=torch.float32, device=codes.device)
    values = torch.empty_like(codes, dtype=torch.float32)
    _in_memory(values).copy_(table[flat.long()] * scales.repeat_interleave(STATE_BLOCK)[: len(flat)])
    return values


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor's elements in the order of memory, [elements]."""
    return tensor.as_strided((tensor.numel(),), (1,))


@cache
def _tables(has_sign: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes in ascending order of their values, and the bounds between neighbouring values."""
    values, order = torch.tensor(core.state_codes[has_sign], dtype=torch.float32).sort(stable=True)
    return order.to(torch.uint8), (values[1:] + values[:-1]) / 2
