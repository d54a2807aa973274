"""One parameter as the fused pass sees it: its memory, and what its gradient and states must look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pybatch import ops
from pybatch.errors import UsageError


@dataclass(slots=True)
class Slot:
    """A parameter of the list.

    `dense` is what the pass updates: the parameter, or a contiguous copy of one whose memory has gaps or overlaps.
    """

    index: int
    param: torch.Tensor
    dense: torch.Tensor
    address: int
    dtype: torch.dtype
    device: torch.device
    contiguous: bool
    stride: tuple[int, ...]

    @staticmethod
    def of(index: int, param: torch.Tensor) -> Slot:
        """The slot of a parameter, `index` counted over all groups."""
        value = param.detach()
        dense = value if is_dense(value) else value.clone(memory_format=torch.contiguous_format)
        return Slot(
            index, param, dense, value.data_ptr(), value.dtype, value.device, dense.is_contiguous(), dense.stride()
        )

    def fits(self, grad: torch.Tensor) -> bool:
        """Whether the pass can read this gradient as it is."""
        if grad.dtype is not self.dtype or grad.device != self.device:
            return False
        if self.contiguous:
            return grad.is_contiguous()  # False for a sparse one
        return grad.layout is torch.strided and grad.stride() == self.stride


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether elements fill one block of memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_param(index: int, param: torch.Tensor, device: torch.device | None = None) -> None:
    """Raise UsageError for a parameter no backend can update; `device` is where the others are."""
    what = f"parameter {index} of shape {tuple(param.shape)}"
    if hasattr(param, "to_local"):
        raise UsageError(f"{what} is a {type(param).__name__}: sharded parameters are not supported. Use torch.optim.")
    if param.layout is not torch.strided:
        raise UsageError(f"{what} has layout {param.layout}: only dense parameters can be updated. Use torch.optim.")
    if param.dtype not in ops.DTYPES:
        known = ", ".join(str(dtype) for dtype in ops.DTYPES)
        raise UsageError(f"{what} is {param.dtype}: only {known} can be updated. Convert it, or use torch.optim.")
    if device is not None and param.device != device:
        raise UsageError(f"{what} is on {param.device}, the ones before it on {device}. Use one optimizer per device.")


def conform(slot: Slot, grad: torch.Tensor) -> torch.Tensor:
    """A copy of the gradient in the layout of its parameter; raises UsageError where there can be none."""
    what = f"the gradient of parameter {slot.index} of shape {tuple(slot.param.shape)}"
    if grad.layout is not torch.strided:
        raise UsageError(f"{what} has layout {grad.layout}. Use sparse=False in its module, or torch.optim.SparseAdam.")
    if grad.dtype != slot.dtype:
        raise UsageError(f"{what} is {grad.dtype}, the parameter {slot.dtype}. Convert one to the other's dtype.")
    if grad.device != slot.dense.device:
        raise UsageError(f"{what} is on {grad.device}, the parameter on {slot.dense.device}. Move one to the other.")
    return torch.empty_like(slot.dense).copy_(grad)


def own_storage(grad: torch.Tensor) -> bool:
    """Whether the gradient fills a storage of its own: a view into a bucket (DDP) is written by others."""
    return grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


def fit_state(slot: Slot, name: str, saved: torch.Tensor | None) -> torch.Tensor:
    """The fp32 state of a parameter in the layout of its memory: zeros, or what was saved, copied where it must be."""
    if saved is None:
        return torch.zeros_like(slot.dense, dtype=torch.float32)
    if saved.shape != slot.param.shape:
        raise UsageError(
            f"state {name!r} of parameter {slot.index} has shape {tuple(saved.shape)}, the parameter "
            f"{tuple(slot.param.shape)}. Load the state_dict of a model of the same shapes."
        )
    if saved.dtype == torch.float32 and saved.device == slot.dense.device and saved.stride() == slot.stride:
        return saved
    return torch.empty_like(slot.dense, dtype=torch.float32).copy_(saved)
