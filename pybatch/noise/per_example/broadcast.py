"""Parameters used element by element: position tables, scales, class tokens, and selections of them.

Such a parameter meets the batch by broadcasting. Expanding it to the batch first leaves the result unchanged, and the
gradient of the expanded tensor is the per-example gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Results depend on each element of the parameter alone, so that any formula may be behind them.
ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name)
    for place in (torch, Tensor)
    for stem in ("add", "sub", "mul", "div", "true_divide", "multiply", "subtract", "divide")
    for name in (stem, f"{stem}_", f"__{stem}__", f"__r{stem}__", f"__i{stem}__")
    if hasattr(place, name)
)

# Results are elements of the parameter, moved about: the same call on a tensor of element numbers says which.
SELECTING: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name)
    for place in (torch, Tensor)
    for name in (
        "__getitem__", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute", "t",
        "narrow", "select", "index_select", "movedim", "contiguous", "view_as",
    )
    if hasattr(place, name)
)  # fmt: skip

EXPANDING: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.broadcast_to, torch.broadcast_to}
)


def expand_to_batch(values: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor with the batch of a result of this shape in front, [n, *own]; None where it has that dimension."""
    missing = len(shape) - values.ndim
    if missing < 0 or (missing == 0 and values.shape[0] != 1):
        return None
    own = (1,) * (missing - 1) + tuple(values.shape) if missing else tuple(values.shape[1:])
    return values.reshape(1, *own).expand(shape[0], *own)


def collapse(grad: Tensor, own: torch.Size) -> Tensor:
    """Gradient [n, ...] of an expanded tensor -> [n, *own], summed over whatever else was expanded."""
    inner = (1,) * (grad.ndim - 1 - len(own)) + tuple(own) if grad.ndim - 1 >= len(own) else tuple(own[1:])
    repeated = [i for i, (size, mine) in enumerate(zip(grad.shape[1:], inner, strict=True), start=1) if size != mine]
    return (grad.sum(repeated, keepdim=True) if repeated else grad).reshape(len(grad), *own)
