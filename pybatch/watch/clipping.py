"""Whether gradients are scaled between the backward pass and the update, as clipping does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ALIKE = 1e-3  # of a norm: unscaling by a power of two is exact but where fp16 ends


class Left:
    """Gradients as a backward pass left them.

    A change in place counts up a tensor's version, but through `.data`, where the norms alone tell: one factor for all
    is clipping, several are something else, such as weight decay. Of a single tensor these can't be told apart.

    Args:
        params: those that have a gradient.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._versions = [p.grad._version for p in params if p.grad is not None]
        self._norms = _norms(params)

    def clipped(self, scaler: Any) -> bool:
        """Whether all were changed since, by more than the GradScaler where there is one; waits for the device."""
        now = [p.grad._version for p in self._params if p.grad is not None]
        if not now or len(now) < len(self._versions):
            return False
        if min(n - before for n, before in zip(now, self._versions, strict=True)) > (scaler is not None):
            return True
        norms = _norms(self._params)
        if self._norms is None or norms is None:
            return False
        ratios = (norms / self._norms)[(self._norms > 0) | (norms > 0)]
        if not len(ratios) or not ratios.isfinite().all():
            return False
        factor, alike = float(ratios.max()), max(_ALIKE, *(2 * torch.finfo(p.dtype).eps for p in self._params))
        if float(ratios.min()) < (1 - alike) * factor:
            return False
        own = (1.0, 1.0 / scaler.get_scale()) if scaler is not None else (1.0,)
        return all(abs(factor - ratio) > _ALIKE * ratio for ratio in own)


def _norms(params: Sequence[Tensor]) -> Tensor | None:
    """Of each gradient, fp64; None where they are sparse, or lie on several devices."""
    grads = [p.grad.detach() for p in params if p.grad is not None]
    if not grads or any(g.layout is not torch.strided or g.device != grads[0].device for g in grads):
        return None
    return torch.stack([n.double() for n in torch._foreach_norm(grads)])
