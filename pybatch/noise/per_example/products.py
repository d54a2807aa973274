"""Which products a device's norms are formed with: torch, or the Triton kernels."""

from __future__ import annotations

import torch

from pybatch import ops
from pybatch.errors import DeviceError, UsageError
from pybatch.noise.per_example.uses import TORCH, Products


def choose(backend: str | None, device: torch.device) -> Products:
    """The products of this name, or the best for the device; raises UsageError or DeviceError with the remedy."""
    if backend not in (None, "torch", "triton"):
        raise UsageError(f"backend {backend!r} is not known. Use 'torch', 'triton', or None for the best.")
    if backend == "torch" or (backend is None and device.type == "cpu"):
        return TORCH
    reason = ops.why_not("triton", device)
    if reason is None:
        raise NotImplementedError
    if backend is None:
        return TORCH
    raise DeviceError(f"backend 'triton' can't be used: {reason}")
