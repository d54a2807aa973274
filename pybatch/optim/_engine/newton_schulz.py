"""Orthogonalization of many matrices at once by Newton-Schulz iterations in bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Jordan 2024: a quintic with a steep slope at 0. It does not converge: singular values that are not tiny end near 1,
# in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7  # smallest norm that is divided by
PART = 1 << 24  # elements worked on at a time: a few temporaries of 32 MiB, large enough to keep a GPU busy


@torch.no_grad()
def orthogonalize(
    matrices: Sequence[torch.Tensor],
    coefficients: Sequence[float] = COEFFICIENTS,
    steps: int = STEPS,
    eps: float = EPS,
) -> None:
    """Replace every matrix U S V^T by about U V^T, in place (Jordan et al. 2024, "Muon").

    X <- a X + b (X X^T) X + c (X X^T)^2 X, after division by the Frobenius norm. The products are batched over the
    matrices, and taken on the shorter side.

    Args:
        matrices: bf16 [rows, columns], all of one shape.
        coefficients: a, b, c.
        steps: iterations; 0 only normalizes.
        eps: the norm is taken to be at least this, so that a zero matrix stays zero.
    """
    if not matrices or not matrices[0].numel():
        return
    count = max(1, PART // matrices[0].numel())
    for first in range(0, len(matrices), count):
        part = list(matrices[first : first + count])
        torch._foreach_copy_(part, list(_iterate(torch.stack(part), coefficients, steps, eps)))


def _iterate(x: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float) -> torch.Tensor:
    a, b, c = coefficients
    tall = x.size(1) > x.size(2)
    # Summed in fp32; dividing by its bf16 rounding leaves the largest singular value at most 0.4 % above 1.
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=eps)
    x = x / norm.to(x.dtype)
    for _ in range(steps):
        turned = x.mT
        gram = torch.bmm(turned, x) if tall else torch.bmm(x, turned)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x
