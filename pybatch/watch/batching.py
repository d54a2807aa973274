"""Which dimension of a model's arguments is the batch, and the same arguments at another batch size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pybatch.base.errors import WorkloadError

_ALTERNATIVES = 11  # that are tried, each by a pass


@dataclass(frozen=True)
class Batching:
    """The batch of one pass: how many examples, and in which dimension of which tensor among the arguments."""

    size: int
    dims: tuple[int | None, ...]  # of each leaf of (args, kwargs); None: no tensor, or one without examples

    @property
    def first(self) -> int:
        """The batch dimension of the first tensor."""
        return next(dim for dim in self.dims if dim is not None)


def find_batching(arguments: Any, seen: Sequence[int] = ()) -> Batching | None:
    """The batch dimension of a forward pass's arguments; None where they hold no tensor.

    A number of examples stands in every tensor that has examples: in a language model's tokens [length, batch] and its
    hidden state [layers, batch, width] it is the one they share. Dimension 0 of the first tensor is taken where nothing
    speaks against it.

    Args:
        arguments: (args, kwargs) of the forward pass.
        seen: batch sizes that layers with `batch_first=False` met in their inputs.
    """
    leaves = tree_flatten(arguments)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        return None
    first = tensors[0]
    telling = [t for t in tensors[1:] if len(set(t.shape)) > 1]  # masks and positions [length, length] may lack it
    shared = [size for size in first.shape if telling and all(size in t.shape for t in telling)]
    candidates = [*(size for size in seen if size in first.shape), *shared]
    size = first.shape[0] if not candidates or first.shape[0] in candidates else candidates[0]
    place = list(first.shape).index(size)
    return Batching(size, tuple(_dimension(leaf, size, place) for leaf in leaves))


def _dimension(leaf: Any, size: int, place: int) -> int | None:
    if not isinstance(leaf, Tensor) or size not in leaf.shape:
        return None
    return place if leaf.ndim > place and leaf.shape[place] == size else list(leaf.shape).index(size)


def alternatives(arguments: Any, batching: Batching) -> list[Batching]:
    """As many examples in other dimensions, where a tensor has that size twice, as tokens [20, 20] have.

    A later tensor all of whose dimensions have it, such as a mask of lengths, may hold none at all.
    """
    leaves, choices = tree_flatten(arguments)[0], list[list[int | None]]()
    for leaf, dim in zip(leaves, batching.dims, strict=True):
        others = [d for d, n in enumerate(leaf.shape) if n == batching.size and d != dim] if dim is not None else []
        square = len(others) > 0 and len(others) + 1 == leaf.ndim and any(d != [None] for d in choices)
        choices.append([dim, *others, *([None] if square else [])])
    found = itertools.islice(itertools.product(*choices), 1, 1 + _ALTERNATIVES)
    return [Batching(batching.size, dims) for dims in found]


def examples_in(arguments: Any, batching: Batching | None) -> int | None:
    """How many examples another pass of the same model has; None where that can't be told."""
    if batching is None:
        return None
    args, dim = arguments[0], batching.dims[0]
    if dim is not None and args and isinstance(args[0], Tensor):  # the usual case, in every pass
        return int(args[0].shape[dim]) if args[0].ndim > dim else None
    leaves = tree_flatten(arguments)[0]
    if len(leaves) != len(batching.dims):
        return None
    for leaf, dim in zip(leaves, batching.dims, strict=True):
        if dim is not None and isinstance(leaf, Tensor) and leaf.ndim > dim:
            return int(leaf.shape[dim])
    return None


def resized(arguments: Any, batching: Batching, n: int) -> Any:
    """The arguments with n examples: the first of them, or all again and again. Tensors are new and need no gradient.

    One that needed a gradient needs one here too. Nothing of the given ones is changed.
    """
    leaves, spec = tree_flatten(arguments)
    made = [
        _taken(leaf, dim, n) if isinstance(leaf, Tensor) else leaf
        for leaf, dim in zip(leaves, batching.dims, strict=True)
    ]
    return tree_unflatten(made, spec)


def _taken(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    own = tensor.detach()
    own = own.clone() if dim is None else _cycled(own, dim, n)
    return own.requires_grad_(tensor.requires_grad)


def _cycled(tensor: Tensor, dim: int, n: int) -> Tensor:
    """The first n along a dimension, beginning anew where it ends."""
    index = torch.arange(n, device=tensor.device) % tensor.shape[dim]
    return tensor.index_select(dim, index)


def resized_like(gradient: Tensor, output: Tensor) -> Tensor:
    """A gradient in the shape of the output of another batch size.

    Raises:
        WorkloadError: it has another number of dimensions.
    """
    if gradient.ndim != output.ndim:
        raise WorkloadError(
            f"an output has {output.ndim} dimensions at another batch size where it had {gradient.ndim}"
        )
    for dim, n in enumerate(output.shape):
        if gradient.shape[dim] != n:
            gradient = _cycled(gradient, dim, n)
    return gradient


_LAYERS = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerDecoder)


def batch_in_layer(module: nn.Module, args: Any) -> tuple[int, bool] | None:
    """Batch size of a layer's input, and whether it comes second, as in [length, batch, width]; None: not known."""
    if not isinstance(module, _LAYERS) or not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
        return None
    first = getattr(module, "batch_first", None)
    if first is None and isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        first = getattr(getattr(module.layers[0], "self_attn", None), "batch_first", None)
    if first is None:
        return None
    return int(args[0].shape[0 if first else 1]), not first


class BatchSecond:
    """Notes the batch sizes that layers with `batch_first=False` meet, whose inputs are [length, batch, width]."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def see(self, module: nn.Module, args: Any) -> None:
        """A forward pass of some layer begins."""
        found = batch_in_layer(module, args)
        if found is not None and found[1] and found[0] not in self.sizes:
            self.sizes.append(found[0])
