"""Batches that are used more than once: a loss or a model may change its batch in place, and none finds it changed."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_ALIGNED = 16  # bytes; no element is larger
_VALUES = (int, float, complex, str, bytes, type(None))  # which nothing changes


def copied(batch: Any) -> Any:
    """The batch in memory of its own. Tensors that share memory, as an input and the target within it, still do."""
    leaves, structure = tree_flatten(batch)
    sharing: dict[tuple[torch.device, int], list[Tensor]] = {}
    for leaf in leaves:
        if _strided(leaf):
            sharing.setdefault(_storage(leaf), []).append(leaf)
    made: dict[int, Any] = {}
    for tensors in sharing.values():
        made |= _copied_together(tensors)
    for leaf in leaves:
        if id(leaf) not in made and not isinstance(leaf, _VALUES):
            made[id(leaf)] = _copied_alone(leaf)
    return tree_unflatten([made.get(id(leaf), leaf) for leaf in leaves], structure)


def differs(batch: Any, other: Any) -> bool:
    """Whether a tensor of one batch has other values than that of its copy. Waits for the device."""
    pairs = zip(_tensors(batch), _tensors(other), strict=True)
    return any(a.shape != b.shape or not _same_values(a, b) for a, b in pairs)


class Reused:
    """One batch for many steps, each of which finds it as it was drawn.

    Whether the steps change it is seen by its contents at the second use, or at `settle`; after that torch's counts of
    changes in place are looked at. Putting back takes a second copy of the batch, kept only where it is needed.

    Args:
        batch: as drawn.
        changes: what is known of other batches of the same workload; None: nothing yet.
    """

    def __init__(self, batch: Any, changes: bool | None = None) -> None:
        self.changes = changes
        leaves, self._structure = tree_flatten(batch)  # lists and dicts are made anew for each step
        self._leaves, self._used = leaves, False
        self._tensors = _tensors(leaves)
        self._pristine = _tensors(copied(leaves)) if changes is not False else None
        self._versions = _versions(self._tensors)

    def get(self) -> Any:
        """The batch for the next step."""
        if self._used:
            if self.changes is None:
                self.settle()
            if self._pristine is not None:
                with torch.no_grad():
                    for there, here in zip(self._tensors, self._pristine, strict=True):
                        there.copy_(here)
        self._used = True
        return tree_unflatten(self._leaves, self._structure)

    def settle(self) -> None:
        """See whether the steps until now have changed the batch."""
        if self._used and self.changes is None:
            self.changes = differs(self._tensors, self._pristine)
            if not self.changes:
                self._pristine = None
                self._versions = _versions(self._tensors)
        elif self.changes is False and _versions(self._tensors) != self._versions:
            self.changes = True  # this batch is lost; the next one is put back


def _strided(leaf: Any) -> bool:
    return type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_quantized


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _copied_together(tensors: list[Tensor]) -> dict[int, Tensor]:
    """Copies, by the id of what they are of, of tensors that have one memory: the part of it that they take up."""
    first = tensors[0]
    if all(t is first for t in tensors):
        return {id(first): _copied_alone(first)}
    begin = min(t.storage_offset() * t.element_size() for t in tensors) // _ALIGNED * _ALIGNED
    end = max(_end(t) for t in tensors)
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())
    memory = whole[begin:end].clone().untyped_storage()
    made = {}
    for t in tensors:
        offset = (t.storage_offset() * t.element_size() - begin) // t.element_size()
        own = torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, offset, t.shape, t.stride())
        made[id(t)] = own.requires_grad_(t.requires_grad)
    return made


def _end(tensor: Tensor) -> int:
    """The byte of its storage at which a tensor ends."""
    last = sum(int(size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + (last + 1 if tensor.numel() else 0)) * tensor.element_size()


def _copied_alone(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        with torch.no_grad():
            return leaf.clone().requires_grad_(leaf.requires_grad)
    with contextlib.suppress(Exception):  # what cannot be copied, such as an open file, is shared
        return copy.deepcopy(leaf)
    return leaf


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _same_values(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return (a.is_floating_point() or a.is_complex()) and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
