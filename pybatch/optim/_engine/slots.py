"""One parameter as the fused pass sees it: its memory, and what its gradient and states must look like."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _python_dispatch

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine import sharding

EMPTY = 1  # stands for the address of a gradient without elements, because 0 means no gradient


@dataclass(slots=True)
class Slot:
    """A parameter of the list.

    `copy` is what the pass updates where the parameter's memory has gaps or overlaps; None where it is dense: the
    parameter's own memory is then not kept alive here. Shape and layout are of the local shard of a DTensor.
    """

    index: int
    param: torch.Tensor
    copy: torch.Tensor | None
    sharded: bool
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(index: int, param: torch.Tensor) -> Slot:
        """The slot of a parameter, `index` counted over all groups."""
        sharded = sharding.is_sharded(param)
        value = sharding.local(param).detach()
        copy = None if is_dense(value) else value.clone(memory_format=torch.contiguous_format)
        dense = value if copy is None else copy
        return Slot(index, param, copy, sharded, dense.dtype, dense.device, dense.shape, dense.stride())

    @property
    def memory(self) -> torch.Tensor:
        """The tensor whose memory and layout decide whether a table still stands."""
        return sharding.local(self.param) if self.sharded else self.param

    @property
    def dense(self) -> torch.Tensor:
        """What the pass updates: the parameter or its copy."""
        return self.memory.detach() if self.copy is None else self.copy

    @property
    def what(self) -> str:
        """How messages name the parameter."""
        return f"parameter {self.index} of shape {tuple(self.param.shape)}"

    def fits(self, grad: torch.Tensor) -> bool:
        """Whether the pass can read this gradient as it is."""
        if grad.layout is not torch.strided or grad.dtype not in ops.DTYPES or grad.device != self.device:
            return False
        if grad.shape != self.shape or grad.is_neg() or is_wrapper(grad):
            return False
        strides = zip(grad.stride(), self.stride, self.shape, strict=True)
        return not grad.numel() or all(own == wanted or size == 1 for own, wanted, size in strides)


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
    if sharding.is_sharded(param):
        sharding.check(what, param)
        param = sharding.local(param)
    if is_wrapper(param):
        raise UsageError(
            f"{what} is a {type(param.data).__name__}, a wrapper without memory of its own. Use torch.optim."
        )
    if param.layout is not torch.strided:
        raise UsageError(f"{what} has layout {param.layout}: only dense parameters can be updated. Use torch.optim.")
    if param.dtype not in ops.DTYPES:
        known = ", ".join(str(dtype) for dtype in ops.DTYPES)
        why = " This build's compiler had no _Float16: GCC 12 has." if param.dtype == torch.float16 else ""
        raise UsageError(f"{what} is {param.dtype}: only {known} can be updated.{why} Convert it, or use torch.optim.")
    if device is not None and param.device != device:
        raise UsageError(f"{what} is on {param.device}, the ones before it on {device}. Use one optimizer per device.")
    if param.device.type != "meta" and param.numel() and not place(param):
        raise UsageError(f"{what} has elements but no memory (a {type(param.data).__name__}). Use torch.optim.")


is_wrapper: Callable[[object], bool] = _python_dispatch.is_traceable_wrapper_subclass


def place(tensor: torch.Tensor) -> int:
    """Address of the first element; 0 where there is no memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tensor.data_ptr()
    except RuntimeError:  # a FakeTensor's; older ones warn and give 0
        return 0


def addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    """Where the elements of each tensor are; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() or EMPTY for tensor in tensors]


def conform(slot: Slot, grad: torch.Tensor) -> torch.Tensor:
    """The gradient, or a copy of it in the layout of its parameter; raises UsageError where there can be none."""
    what = f"the gradient of {slot.what}"
    if slot.sharded:
        grad = sharding.local_gradient(what, slot.param, grad)
    if slot.fits(grad) and (grad.data_ptr() or not grad.numel()):
        return grad
    if grad.layout is not torch.strided:
        raise UsageError(f"{what} has layout {grad.layout}. Use sparse=False in its module, or torch.optim.SparseAdam.")
    if grad.dtype not in ops.DTYPES:
        raise UsageError(f"{what} is {grad.dtype}, the parameter {slot.dtype}. Convert it to the parameter's dtype.")
    if grad.device != slot.device:
        raise UsageError(f"{what} is on {grad.device}, the parameter on {slot.device}. Move one to the other.")
    if grad.shape != slot.shape:
        raise UsageError(f"{what} has shape {tuple(grad.shape)}. Call zero_grad() after changing a parameter's shape.")
    if is_wrapper(grad):
        raise UsageError(f"{what} is a {type(grad).__name__}, without memory of its own. Use torch.optim.")
    if grad.numel() and not place(grad):
        raise UsageError(f"{what} has elements but no memory (a {type(grad).__name__}). Use torch.optim.")
    return torch.empty_like(slot.dense, dtype=grad.dtype).copy_(grad)


def own_storage(grad: torch.Tensor) -> bool:
    """Whether the gradient fills a storage of its own: a view, as of DDP's bucket, is written by others."""
    return not grad._is_view() and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


def fit_state(slot: Slot, name: str, saved: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A state of a parameter in the layout of its memory: zeros, or what was saved, copied where it must be."""
    if saved is None:
        return ops.zeros_like(slot.dense, dtype)
    if slot.sharded and sharding.is_sharded(saved):
        saved = sharding.local(saved)
    if saved.shape != slot.shape:
        raise UsageError(
            f"state {name!r} of parameter {slot.index} has shape {tuple(saved.shape)}, the parameter "
            f"{tuple(slot.shape)}. Load the state_dict of a model of the same shapes."
        )
    if saved.dtype == dtype and saved.device == slot.device and saved.stride() == slot.stride:
        return saved
    return ops.empty_like(slot.dense, dtype).copy_(saved)


def fit_sum(slot: Slot, total: torch.Tensor | None) -> torch.Tensor | None:
    """The accumulated gradient of a parameter that may have moved since; raises UsageError where it was resized."""
    if total is not None and total.shape != slot.shape:
        raise UsageError(
            f"parameter {slot.index} had shape {tuple(total.shape)} in accumulate() and has {tuple(slot.shape)} now. "
            "Call zero_grad() after changing a parameter's shape."
        )
    return None if total is None else fit_state(slot, "sum", total)
