"""A linear layer whose backward pass forms the weight gradient and the per-example norms together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pybatch.noise.per_example.uses import Products


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
