"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch

from pybatch.errors import UsageError
from pybatch.optim.arguments import check_hyper, check_torch_flags
from pybatch.optim.base import FusedOptimizer


class AdamW(FusedOptimizer):
    """`torch.optim.AdamW` in one fused pass (Loshchilov & Hutter 2019; `amsgrad`: Reddi et al. 2018).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch; betas are floats.
        foreach, fused: accepted for torch's sake and without effect; the pass is always fused.
        capturable, differentiable: must be False; a step is not yet safe to capture in a CUDA graph.
        max_grad_norm, noise, backend: see `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        noise: bool = False,
        backend: str | None = None,
    ) -> None:
        check_torch_flags(differentiable, capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, noise=noise, backend=backend)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_hyper(group, "eps")
        check_hyper(group, "weight_decay")
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise UsageError(f"betas {betas}: both must be at least 0 and below 1. The usual ones are (0.9, 0.999).")

    @classmethod
    def _rule(cls, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        if group["amsgrad"]:
            return "AdamWAmsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return "AdamW", ("exp_avg", "exp_avg_sq")

    @classmethod
    def _hyper(cls, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2), group["eps"], group["weight_decay"]
