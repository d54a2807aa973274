"""Bytes that a piece of work's operators read and write, as if nothing stayed in caches between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pybatch.capacity.operators import Operators

# Their first tensor is written without being read.
_OVERWRITE = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_")
# They read only as much of their largest input as they give.
_GATHER = ("embedding", "index", "index_select", "gather", "take")


class Traffic(Operators):
    """Adds up, in `bytes`, what the operators run under it read and write.

    Each operator reads its inputs once and writes its results once; views move nothing, and an expanded tensor has the
    bytes of its storage. That is what memory must move where tensors are much larger than the caches; smaller ones are
    served by the caches. Work outside torch's dispatcher, such as pybatch's fused updates, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self.bytes += _moved(func, args, kwargs, result)
        return result


def _moved(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    name = func._schema.name.rpartition("::")[2]
    if name.startswith(("empty", "new_empty", "_empty")):
        return 0
    given = list(zip(func._schema.arguments, args, strict=False))
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for argument, value in given:
        tensors = _tensors(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors
            if argument.is_out or name in _OVERWRITE:
                continue
        read += tensors
    known = {_storage(t) for t in (*read, *written)}
    results = _tensors(result)
    fresh = [t for t in results if _storage(t) not in known]
    if results and not fresh and not written:
        return 0  # a view
    gave = sum(_size(t) for t in fresh)
    sizes = [_size(t) for t in read]
    if name in _GATHER and sizes:
        sizes[sizes.index(max(sizes))] = min(max(sizes), gave)
    return sum(sizes) + sum(map(_size, written)) + gave


def _tensors(value: Any) -> list[torch.Tensor]:
    return [part for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) for part in _parts(leaf)]


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a tensor keeps in memory: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()  # the library's own packing, as of mkldnn: its bytes are not known


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def update_bytes(parameters: Iterable[torch.Tensor], state: dict[Any, dict[str, Any]]) -> int:
    """Bytes of a fused update: parameters and states read and written, gradients read (28 B per parameter of AdamW)."""
    total = 0
    for p in parameters:
        states = [v for v in state[p].values() if isinstance(v, torch.Tensor) and v.numel() == p.numel() and v.ndim]
        total += 3 * p.numel() * p.element_size() + 2 * sum(v.numel() * v.element_size() for v in states)
    return total
