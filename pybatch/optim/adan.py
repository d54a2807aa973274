"""Adan: adaptive Nesterov momentum."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine.arguments import check_betas, check_hyper
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class Adan(FusedOptimizer):
    """Adan in one fused pass (Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm", algorithm 1).

    With d = g - g of the step before (0 in the first), m, n and v averages of g, of (g + beta2 d)^2 and of d:
    p <- (p - lr (m^ + beta2 v^) / (sqrt(n^) + eps)) / (1 + lr wd), bias corrected as its authors do.

    Args:
        params: as in torch.
        lr: the authors' advice is five to ten times AdamW's.
        betas: what is kept of the averages of g, of d and of the squares, in each step.
        eps: added to the root.
        weight_decay: proximal; 0.02 is common.
        no_prox: decay scales the parameter before the step, as AdamW's does.
        maximize, capturable: as in torch.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "no_prox": no_prox,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"], usual=(0.98, 0.92, 0.99))
        check_hyper(group, "eps")
        check_hyper(group, "weight_decay")
        if not isinstance(group["no_prox"], bool):
            raise UsageError(f"no_prox {group['no_prox']!r}: it is False (proximal decay) or True (as AdamW's).")

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return ParamRule("Adan", ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        betas = dict(zip(("beta1", "beta2", "beta3"), group["betas"], strict=True))
        return betas | {name: group[name] for name in ("eps", "weight_decay", "no_prox")}
