"""Layers of a stack that run faster, or at all, with its replicas folded into a dimension they have already.

Images: `vmap` folds replicas into the channels to convolve and into the batch to pool, with a copy between the two, and
adds the bias in a pass of its own. Here images [n, replicas * channels, rows, columns] stay as they are from one layer
to the next, in the order that torch's CPU kernels take best. With 36 replicas of 64 digits, one thread of an AMD EPYC,
forward and backward: a convolution of one channel 4.6 ms against 22.7, the pooling after it 2.3 against 14.9.

Embeddings: `vmap` passes on the index of padding as it is, a row of the first replica's alone, so that others train it.

Attention: torch has no rule to `vmap` its CPU kernel, and runs replicas one by one; here they join the batch. On a GPU
torch's rule has them join it too, but its kernels take only so large a batch, which a stack exceeds: here it is parted.
In torch's `multi_head_attention_forward` a mode does not see it: there it is made of products on a CPU, which have a
rule, and left to torch on a GPU.

LSTMs: see `recurrent.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pybatch.training.recurrent import Recurrent, recurrent

# Blocks along the second and third dimension of a CUDA grid, where torch's attention kernels have batch and heads.
GRID = 2**16 - 1
# Elements that the backward pass of its flash attention can index: of a query with its length rounded up to 128 and its
# width to 32 at least. Past it the kernel writes elsewhere, and the process loses the device.
INDEXED = 2**31

# What is done to images with so many replicas in their channels, with the weight and bias of all of them.
Operation = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]


class Folding(TorchFunctionMode):
    """Within it, and within `vmap`, attention is folded, and on a CPU layers of images [n, channels, rows, columns].

    Embeddings do not train what they have for padding. Layers of images are `conv2d`, `group_norm` and pooling; others
    see the same images as without it, in another order of memory. `used` tells whether there was one.

    Args:
        images: whether to fold them; attention and LSTMs are always.
    """

    def __init__(self, images: bool = True) -> None:
        super().__init__()
        self.images, self.used = images, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """As `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and (attended := _attention(*args, **kwargs)) is not None:
            return _Attended.apply(*attended)  # type: ignore[no-untyped-call]
        if func is functional.multi_head_attention_forward and _is(args[0], 3, ("cpu",)):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        if func is torch.lstm and (run := recurrent(*args, **kwargs)) is not None:
            return Recurrent.apply(*run)  # type: ignore[no-untyped-call]
        if self.images and args and _is(args[0], 4, ("cpu",)):
            if (fold := _FOLDS.get(func)) is not None:
                self.used = True
                return _Folded.apply(*fold(*args, **kwargs))  # type: ignore[no-untyped-call]
            if func is Tensor.view:  # asks for an order that these images need not have
                return func(args[0].contiguous(), *args[1:], **kwargs)
        return func(*args, **kwargs)


class _Folded(torch.autograd.Function):
    """An operation, which `vmap` runs folded; what is run then is differentiated as without `vmap`."""

    @staticmethod
    def forward(operation: Operation, images: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return operation(1, images, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: without `vmap` there is no gradient here."""

    @staticmethod
    def vmap(
        info: Any, dims: Any, operation: Operation, images: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        images, parameters = _stacked(images, dims[1], n), []
        for tensor, dim in ((weight, dims[2]), (bias, dims[3])):
            parameters.append(None if tensor is None else _stacked(tensor, dim, n).flatten(0, 1))
        # Images of an earlier fold have this order already, and are not copied.
        folded = images.permute(1, 3, 4, 0, 2).contiguous().flatten(3).permute(0, 3, 1, 2)
        found = operation(n, folded, *parameters)
        return found.reshape(len(found), n, -1, *found.shape[2:]), 1


class _Attended(torch.autograd.Function):
    """Attention over [n, heads, length, width], as `_Folded`, with replicas folded into n."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """As `_Folded.setup_context`."""

    @staticmethod
    def vmap(
        info: Any, dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        query, key, value = (_stacked(each, dim, n) for each, dim in zip((query, key, value), dims, strict=False))
        if mask is not None:
            mask = _stacked(mask, dims[3], n)
            mask = mask.reshape(n, *[1] * (5 - mask.dim()), *mask.shape[1:])  # as it is broadcast
            mask = mask.expand(n, query.shape[1], *mask.shape[2:]).flatten(0, 1)
        inputs = [each.flatten(0, 1) for each in (query, key, value)] + ([] if mask is None else [mask])
        parts = zip(*(torch.split(each, most_at_once(inputs[0])) for each in inputs), strict=True)
        found = [functional.scaled_dot_product_attention(*part, **options) for part in parts]
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.reshape(n, -1, *whole.shape[1:]), 0


def most_at_once(query: Tensor) -> int:
    """Examples of a query [n, heads, length, width] that one call of torch's attention takes on its device."""
    n, heads, length, width = query.shape
    if query.device.type != "cuda":
        return n
    indexed = heads * -(-length // 128) * 128 * max(32, 1 << (width - 1).bit_length())
    return min(n, max(1, min(GRID // max(1, heads), INDEXED // max(1, indexed))))


def _is(value: Any, dimensions: int, kinds: tuple[str, ...]) -> bool:
    return isinstance(value, Tensor) and value.dim() == dimensions and value.device.type in kinds


def _stacked(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    """[n, ...], whatever `vmap` has it along."""
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


Fold = tuple[Operation, Tensor, Tensor | None, Tensor | None]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Any, ...] | None:
    """Arguments of `_Attended`; None for what is left to `vmap`, which refuses dropout."""
    three = (query, key, value)
    known = all(_is(each, 4, ("cpu", "cuda")) for each in three)
    if dropout_p or not known or len({each.shape[0] for each in three}) > 1:
        return None
    return *three, attn_mask, {"is_causal": is_causal, **options}


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    found = functional.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), found.detach(), found)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Fold:
    return lambda n, x, w, b: torch.conv2d(x, w, b, stride, padding, dilation, n * groups), input, weight, bias


def _each(layer: Callable[..., Tensor]) -> Callable[..., Fold]:
    """Of a layer that has no parameters and takes channels one by one."""

    def fold(input: Tensor, *args: Any, **kwargs: Any) -> Fold:
        return lambda n, x, w, b: layer(x, *args, **kwargs), input, None, None

    return fold


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Fold:
    return lambda n, x, w, b: functional.group_norm(x, n * num_groups, w, b, eps), input, weight, bias


_POOLS = (torch.max_pool2d, functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d)
_FOLDS: dict[Callable[..., Any], Callable[..., Fold]] = {
    torch.conv2d: _conv2d,
    functional.group_norm: _group_norm,
    **{pool: _each(pool) for pool in _POOLS},
}
