"""Layers whose backward pass yields the per-example norms on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pybatch.noise.per_example.uses import NormBackward, Products


class FusedLinear(torch.autograd.Function):
    """torch.nn.functional.linear, the gradient of its weight formed example by example.

    The products are those of the library's weight gradient and no more: each example's is squared before it is added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        products: Products,
        arrived: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        kind = input.device.type
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        if torch.is_autocast_enabled(kind):  # as the library does, which keeps the cast copies for the backward pass
            dtype = torch.get_autocast_dtype(kind)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(input, weight)
        ctx.products, ctx.arrived = products, arrived
        return F.linear(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        into, own, added = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            rows, cols = (x.reshape(len(x), -1, x.shape[-1]) for x in (grad, input))
            norm, total = ctx.products.fused(rows, cols)
            back = (grad @ weight).to(into) if ctx.needs_input_grad[0] else None
            bias = rows.sum((0, 1)).to(added) if ctx.needs_input_grad[2] else None
        ctx.arrived(grad, norm)
        return back, total.to(own), bias, None, None


class FusedNorm(torch.autograd.Function):
    """LayerNorm or RMSNorm over the last dimension; one pass backward gives the input's gradient and each example's
    weight and bias gradients (Gray et al. 2024)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        backward: NormBackward,
        arrived: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.save_for_backward(input, weight)
        ctx.options, ctx.through, ctx.arrived = (eps, centred), backward, arrived
        shape = input.shape[-1:]
        if centred:
            return F.layer_norm(input, shape, weight, bias, eps)
        return F.rms_norm(input, shape, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        back, scaled, plain = ctx.through(grad, input, weight, *ctx.options)
        ctx.arrived(grad, scaled, plain)
        totals = [
            found.sum(0).to(dtype) if needed else None
            for found, dtype, needed in zip((scaled, plain), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        ]
        return back, *totals, None, None, None, None
