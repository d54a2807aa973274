"""Which products a device's norms are formed with: torch, or the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybatch import ops
from pybatch.base.errors import DeviceError, UsageError
from pybatch.noise.per_example.uses import TORCH, NormBackward, Products

WIDEST = 16384  # elements of a position that a program holds in registers
RUNS = (
    8  # parts that a sum over examples or positions is split into: enough programs for a small weight on a large device
)


def choose(backend: str | None, device: torch.device) -> Products:
    """The products of this name, or the best for the device; raises UsageError or DeviceError with the remedy."""
    if backend not in (None, "torch", "triton"):
        raise UsageError(f"backend {backend!r} is not known. Use 'torch', 'triton', or None for the best.")
    if backend == "torch" or (backend is None and device.type == "cpu"):
        return TORCH
    reason = ops.why_not("triton", device)
    if reason is None:
        return TritonProducts()
    if backend is None:
        return TORCH
    raise DeviceError(f"backend 'triton' can't be used: {reason}")


class TritonProducts(Products):
    """The same in Triton, where what they sum over stays in registers; float64 tensors go to torch."""

    stored = False

    def __init__(self) -> None:
        self.kernels: Any = ops.example_kernels()

    def single(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As Products.single."""
        return self._run("single", rows, cols)

    def gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As Products.gram."""
        return self._run("gram", rows, cols)

    def weight(self, rows: Tensor, cols: Tensor) -> Tensor:
        """As Products.weight."""
        return self._run("weight", rows, cols)

    def fuses(self, t: int, r: int, c: int) -> bool:
        """As Products.fuses: one kernel in the library's place, where the Gram matrices are larger than the weight."""
        return t * t > r * c

    def fused(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """As Products.fused."""
        if rows.dtype == torch.float64:
            return super().fused(rows, cols)
        with ops.on_device(rows.device):
            squares, total = self.kernels.weight(rows[:, None], cols[:, None], RUNS)
        return squares, total[0]

    def norm_backward(self, input: Tensor, normalized_shape: Sequence[int]) -> NormBackward | None:
        """As Products.norm_backward."""
        if len(normalized_shape) > 1 or normalized_shape[0] > WIDEST or input.dtype == torch.float64:
            return None
        return self._norm_backward

    def _norm_backward(
        self, grad: Tensor, input: Tensor, weight: Tensor | None, eps: float, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, x = (t.reshape(len(t), -1, t.shape[-1]).contiguous() for t in (grad, input))
        with ops.on_device(x.device):
            back, scaled, plain = self.kernels.norm_backward(grad, x, weight, eps, centred, RUNS)
        return back.view_as(input), scaled, plain

    def picked(self, index: Tensor, values: Tensor) -> Tensor:
        """As Products.picked."""
        return self._run("picked", index, values)

    def _run(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        found: Tensor
        if second.dtype == torch.float64:
            found = getattr(super(), name)(first, second)
            return found
        if name != "picked" and first.dtype != second.dtype:
            first, second = first.float(), second.float()
        with ops.on_device(second.device):
            result = getattr(self.kernels, name)(first, second)
        found = result[0] if name == "weight" else result
        return found
