"""Random parameters and gradients of the step benchmarks, and how far two sides' parameters are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from shapes import Shapes

Params = list[torch.nn.Parameter]


def parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.float32) -> Params:
    """The same ones in every call."""
    generator = torch.Generator(device).manual_seed(0)  # a CPU takes a second for what a GPU draws at once
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, device=device).to(dtype)) for shape in shapes]


def gradients(params: Params, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    device = params[0].device
    generator = torch.Generator(device).manual_seed(seed)
    return [(scale * torch.randn(p.shape, generator=generator, device=device)).to(p.dtype) for p in params]


def share(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], start: Sequence[torch.Tensor]) -> float:
    """Sum of deviations over the sum of movements, of all elements; infinite where theirs did not move."""
    with torch.no_grad():
        apart = sum(float((p.double() - q).abs().sum()) for p, q in zip(ours, theirs, strict=True))
        moved = sum(float((q.double() - s).abs().sum()) for q, s in zip(theirs, start, strict=True))
    return apart / moved if moved else math.inf
