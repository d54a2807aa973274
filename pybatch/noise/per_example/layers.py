"""The supported operations: for each, what a use of its parameters adds to the per-example gradients.

A rule has the operation's own signature, and returns for each parameter argument a function from the gradient of the
output to the use. Operations are seen at the level of torch.nn.functional: it makes no difference which module calls
them. A rule raises UsageError where its arguments leave per-example gradients undefined or unsupported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pybatch.base.errors import UsageError
from pybatch.noise.per_example.uses import Dense, Outer, Picked, Use, wide

Parts = dict[str, Callable[[Tensor], Use]]

MICRO_BATCHES = "Use source='micro-batches', with two or more backward passes a step, or 'adam-moments'"


@dataclass(frozen=True)
class LayerFormula:
    """One operation and the signature its arguments are bound by; the first argument carries the batch."""

    name: str
    parts: Callable[..., Parts]
    signature: inspect.Signature

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


FORMULAS: dict[Callable[..., Any], LayerFormula] = {}


def _rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Parts]], Callable[..., Parts]]:
    def add(parts: Callable[..., Parts]) -> Callable[..., Parts]:
        for function in functions:
            FORMULAS[function] = LayerFormula(parts.__name__, parts, inspect.signature(parts))
        return parts

    return add


@_rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Parts:
    """Rows are output gradients, columns inputs; every dimension between the first and the last is a sequence."""
    _at_least(input, 2, "linear")
    return {
        "weight": lambda grad: _matrix(grad, input),
        "bias": lambda grad: Dense(wide(_sequence(grad)).sum(1)),
    }


@_rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Parts:
    """The rows are one-hot; padding gets no gradient."""
    for option, on in (("max_norm", max_norm is not None), ("scale_grad_by_freq", scale_grad_by_freq)):
        if on:
            raise UsageError(f"embedding with {option}: an example's gradient then depends on the rest. Leave it out.")
    if sparse:
        raise UsageError("embedding with sparse=True: sparse gradients are not supported. Use sparse=False.")

    def picked(grad: Tensor) -> Picked:
        values = wide(_sequence(grad)) if input.ndim > 1 else wide(grad)[:, None]
        index = input.reshape(len(input), -1).long()
        if padding_idx is not None:
            values = values.masked_fill((index == padding_idx % len(weight))[..., None], 0.0)
        return Picked(index, values)

    return {"weight": picked}


def _convolution(dimensions: int) -> Callable[..., Parts]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Parts:
        """A linear layer over unfolded windows, one per group."""
        if input.ndim != dimensions + 2:
            raise UsageError(
                f"conv{dimensions}d: its input has {input.ndim} dimensions, with a batch dimension in front it has "
                f"{dimensions + 2}. {MICRO_BATCHES}."
            )

        def unfold(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            windows = _windows(x.to(grad.dtype), weight.shape[2:], stride, padding, dilation)
            shape = (len(grad), groups, -1, grad.shape[2:].numel())
            return grad.reshape(shape).mT, windows.reshape(shape).mT

        def outer(grad: Tensor) -> Outer:
            r, c = weight.shape[0] // groups, weight.shape[1:].numel()
            return Outer(grad, input, unfold, (groups, grad.shape[2:].numel(), r, c))

        return {"weight": outer, "bias": lambda grad: Dense(wide(grad).flatten(2).sum(2))}

    conv.__name__ = f"conv{dimensions}d"
    return conv


for _dimensions, _function in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1):
    _rule(_function)(_convolution(_dimensions))


def _windows(
    x: Tensor,
    kernel: torch.Size,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """What each kernel element meets at each place: [n, channels, *kernel, *places], a view of the padded input."""
    d = len(kernel)
    strides, dilations = _each(stride, d), _each(dilation, d)
    if padding == "same":
        totals = [dilations[i] * (kernel[i] - 1) for i in range(d)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in _each(0 if isinstance(padding, str) else padding, d)]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    places = [(x.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(d)]
    steps = x.stride()
    return x.as_strided(
        (*x.shape[:2], *kernel, *places),
        (
            *steps[:2],
            *(steps[2 + i] * dilations[i] for i in range(d)),
            *(steps[2 + i] * strides[i] for i in range(d)),
        ),
    )


def _each(value: int | Sequence[int], count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    return list(value) * count if len(value) == 1 else list(value)


@_rule(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Parts:
    """Weight and bias are as small as one position: their per-example gradients are formed."""
    _at_least(input, len(normalized_shape) + 1, "layer_norm")

    def scaled(grad: Tensor) -> Dense:
        normal = F.layer_norm(wide(input), normalized_shape, None, None, eps)
        return Dense(_over_positions(wide(grad) * normal, len(normalized_shape)))

    return {"weight": scaled, "bias": lambda grad: Dense(_over_positions(wide(grad), len(normalized_shape)))}


@_rule(F.rms_norm)
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Parts:
    """As layer_norm, without mean and bias."""
    _at_least(input, len(normalized_shape) + 1, "rms_norm")

    def scaled(grad: Tensor) -> Dense:
        epsilon = torch.finfo(input.dtype).eps if eps is None else eps
        normal = F.rms_norm(wide(input), normalized_shape, None, epsilon)
        return Dense(_over_positions(wide(grad) * normal, len(normalized_shape)))

    return {"weight": scaled}


@_rule(F.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Parts:
    """Weight and bias are per channel."""
    return _per_channel(input, lambda x: F.group_norm(x, num_groups, None, None, eps))


@_rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Parts:
    """Statistics are each example's own, or fixed."""
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    return _per_channel(input, lambda x: F.instance_norm(x, mean, var, None, None, use_input_stats, momentum, eps))


@_rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Parts:
    """With fixed statistics (eval mode) a map of each example on its own."""
    if training:
        raise UsageError(batch_norm_refusal("batch_norm"))
    return _per_channel(input, lambda x: F.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps))


def batch_norm_refusal(name: str) -> str:
    """Why BatchNorm in training has no per-example gradients, and what to do."""
    return (
        f"{name}: batch statistics make each example's loss depend on the whole batch, so per-example gradients are "
        "not defined. Use GroupNorm, put the module in eval mode, or use source='micro-batches'."
    )


@_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: Tensor) -> Parts:
    """input @ weight, the weight a matrix: a linear layer with its weight transposed."""
    if other.ndim != 2 or input.ndim < 2:
        raise UsageError(
            f"matmul of shapes {tuple(input.shape)} and {tuple(other.shape)}: a parameter must be a matrix on the "
            f"right, with the batch in front on the left. {MICRO_BATCHES}."
        )
    return {"other": lambda grad: _matrix(grad, input, transposed=True)}


def _per_channel(input: Tensor, normalize: Callable[[Tensor], Tensor]) -> Parts:
    _at_least(input, 2, "a norm per channel")

    def total(grad: Tensor) -> Tensor:
        return grad.flatten(2).sum(2) if grad.ndim > 2 else grad

    return {
        "weight": lambda grad: Dense(total(wide(grad) * normalize(wide(input)))),
        "bias": lambda grad: Dense(total(wide(grad))),
    }


def _matrix(grad: Tensor, input: Tensor, transposed: bool = False) -> Outer:
    """One outer product per position, of a weight [out, in], or [in, out] where transposed."""

    def unfold(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = _sequence(grad)[:, None], _sequence(x.to(grad.dtype))[:, None]
        return (cols, rows) if transposed else (rows, cols)

    places, out, into = math.prod(grad.shape[1:-1]), grad.shape[-1], input.shape[-1]
    return Outer(grad, input, unfold, (1, places, into, out) if transposed else (1, places, out, into))


def _sequence(x: Tensor) -> Tensor:
    """[n, ..., width] -> [n, t, width]."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def _over_positions(x: Tensor, dimensions: int) -> Tensor:
    """Sum over everything between the batch and the last so many dimensions."""
    middle = tuple(range(1, x.ndim - dimensions))
    return x.sum(middle) if middle else x


def _at_least(input: Tensor, dimensions: int, name: str) -> None:
    if input.ndim < dimensions:
        raise UsageError(
            f"{name}: its input of shape {tuple(input.shape)} has no batch dimension in front. {MICRO_BATCHES}."
        )
