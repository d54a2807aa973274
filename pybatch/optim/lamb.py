"""LAMB: layer-wise adaptive moments."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine.arguments import check_betas, check_hyper, check_skip, skipped
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class LAMB(FusedOptimizer):
    """LAMB in two fused passes (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2).

    u = m^ / (sqrt(v^) + eps) + wd p, with Adam's bias-corrected moments;  p <- p - lr min(|p| / |u|, max_ratio) u.
    The norms are of one parameter each, and the ratio is 1 where either is 0.

    Biases and the scales of normalization layers have no use for a ratio: by default every parameter with at most one
    dimension takes Adam's step, without weight decay.

    Args:
        params, lr, betas, eps: as in `torch.optim.AdamW`; betas are floats, eps is the paper's 1e-6.
        weight_decay: added to Adam's direction, so the ratio scales it too.
        max_ratio: upper bound of the ratio |p| / |u|; None: no bound. 10 is common.
        skip: None: parameters with at most one dimension take Adam's step; True: all of the group; False: none. An
            option of param groups too: {"params": biases, "skip": True}.
        maximize, capturable: as in torch.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    rule_options: ClassVar[tuple[str, ...]] = ("skip",)

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        max_ratio: float | None = None,
        *,
        skip: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_ratio": max_ratio,
            "skip": skip,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        check_hyper(group, "eps")
        check_hyper(group, "weight_decay")
        check_skip(group["skip"])
        bound = group["max_ratio"]
        if bound is not None and not float(bound) > 0.0:
            raise UsageError(f"max_ratio {bound}: it must be above 0. 10 is common; None sets no bound.")

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return ParamRule("AdamW" if skipped(group, param) else "Lamb", ("exp_avg", "exp_avg_sq"))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        adam = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        if rule.name == "AdamW":
            return adam | {"weight_decay": 0.0}
        bound = math.inf if group["max_ratio"] is None else group["max_ratio"]
        return adam | {"weight_decay": group["weight_decay"], "max_ratio": bound}
