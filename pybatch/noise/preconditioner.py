"""Adam's preconditioner P = 1 / (sqrt(v) + eps), as the last step left it."""

from __future__ import annotations

from typing import Any

import torch

from pybatch.base.errors import UsageError
from pybatch.noise.norms import square
from pybatch.optim import FusedOptimizer
from pybatch.records import Note

EXPERIMENTAL = Note(
    "noise.preconditioned", "experimental: tr(P Sigma) / (G^T P G) with P = 1 / (sqrt(v) + eps) of the step before"
)


class Preconditioner:
    """Squared norms under P of an Adam-like optimizer: one with `betas`, `eps` and the state `exp_avg_sq`.

    P is made from the gradients of earlier steps only, so that the pair of norms stays unbiased given P.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: dict[torch.Tensor, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            if "betas" not in group or "eps" not in group:
                raise UsageError(
                    f"preconditioned=True: {type(optimizer).__name__} keeps no second moment. Use Adam or AdamW."
                )
            self._groups |= dict.fromkeys(group["params"], group)

    def weight(self, param: torch.Tensor) -> torch.Tensor | None:
        """P of this parameter, in fp32; None before its first step."""
        state = self._optimizer.state.get(param, {})
        if "exp_avg_sq" not in state or param not in self._groups:
            return None
        group = self._groups[param]
        if isinstance(self._optimizer, FusedOptimizer):
            state = self._optimizer.fp32_state(group, param)
        step = state["step"]
        if not isinstance(step, torch.Tensor) or step.device.type == "cpu":
            step = float(step)  # one on the device is not read, which would wait
        correction = 1.0 - float(group["betas"][-1]) ** step
        second: torch.Tensor = state["exp_avg_sq"].float() / correction
        weight: torch.Tensor = 1.0 / (second.sqrt() + group["eps"])
        return weight

    def __call__(self, param: torch.Tensor, grad: torch.Tensor, scaled: bool = False) -> torch.Tensor:
        """G^T P G of this parameter's gradient, `scaled` as in `square`: 0-d float64; NaN before its first step."""
        weight = self.weight(param)
        if weight is None:
            return torch.full((), torch.nan, dtype=torch.float64, device=grad.device)
        return square(grad * weight.sqrt(), scaled)
