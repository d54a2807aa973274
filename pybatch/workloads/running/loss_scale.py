"""The scale of fp16 losses, and when a training of them is over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST, _GROWTH = 2.0**16, 2000  # as torch's GradScaler begins, and steps after which it doubles
# GradScaler halves without an end, and a training that has diverged goes on as steps left out. fairseq ends one at a
# scale of 1e-4, DeepSpeed at 1; here it is fp16's smallest normal number, 30 halvings from the first scale.
LEAST = 2.0**-14
SKIPPED = 50  # updates left out in a row, after which a training has diverged


@dataclass
class LossScale:
    """By what losses are multiplied: halved where gradients overflow, doubled after 2000 updates without."""

    value: float = _FIRST
    fine: int = 0  # updates since it last changed
    skipped: int = 0  # updates left out in a row

    @property
    def diverged(self) -> bool:
        """Whether gradients overflowed for so long that no scale helps."""
        return self.skipped >= SKIPPED

    def update(self, gradients: Iterable[Tensor | None]) -> bool:
        """Whether an update by these gradients can be made. Waits for the device."""
        values = [_values(gradient) for gradient in gradients if gradient is not None]
        if values and not all(norm.isfinite() for norm in torch._foreach_norm(values)):
            self.value, self.fine, self.skipped = max(LEAST, self.value / 2), 0, self.skipped + 1
            return False
        self.fine, self.skipped = self.fine + 1, 0
        if self.fine == _GROWTH:
            self.value, self.fine = self.value * 2, 0
        return True


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
