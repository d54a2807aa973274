"""What a GradScaler leaves on an optimizer that unscales by itself: the attributes `grad_scale` and `found_inf`.

A step that is taken leaves `.grad` unscaled, as torch's fused optimizers do; one that is skipped leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine import sharding
from pybatch.optim._engine.slots import EMPTY
from pybatch.optim._engine.tables import Gradients


def scalars(optimizer: object, device: torch.device) -> list[torch.Tensor | None]:
    """Scale and verdict as fp32 on the device, None where there is none."""
    values = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
    return [None if value is None else torch.as_tensor(value, dtype=torch.float32, device=device) for value in values]


def in_pass(found: Gradients) -> bool:
    """Whether the pass itself can leave the gradients unscaled: each is where the pass reads it, and read once."""
    places = found.addresses[found.addresses > EMPTY]
    return not found.copies and len(np.unique(places)) == len(places)


def unscale(params: Sequence[torch.Tensor], grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
    """Where the pass can't: leave `.grad` unscaled by a step that was taken, else untouched."""
    if grad_scale is None:
        return
    divisor = grad_scale if found_inf is None else torch.where(found_inf > 0, 1.0, grad_scale)
    grads = (sharding.local(param.grad) for param in params if param.grad is not None)
    each = {grad.data_ptr(): grad for grad in grads if grad.numel()}  # parameters may share one
    if each:
        torch._foreach_div_(list(each.values()), divisor)


def forget(optimizer: object) -> None:
    """Remove both after a refused step: the scaler does so only after a successful one."""
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)


def check_consumed(optimizer: object, params: Sequence[torch.Tensor]) -> None:
    """Raise UsageError unless a step after accumulate() can use the sums alone."""
    for index, param in enumerate(params):
        if param.grad is not None:
            raise UsageError(
                f"step() after accumulate(): parameter {index} of shape {tuple(param.shape)} has a gradient that "
                "was not accumulated. Call accumulate(n) after every backward(), the last one too."
            )
    # The scaler found no gradient to look at: its verdict is the int 0, and its update() would fail.
    if isinstance(getattr(optimizer, "found_inf", None), int):
        raise UsageError(
            "GradScaler.step() after accumulate(): the scaler looks for infinities in p.grad, which accumulate() "
            "has consumed. Let .grad accumulate as in torch, or train in bf16 without a scaler."
        )
