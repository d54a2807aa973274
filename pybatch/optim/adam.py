"""Adam, with coupled or decoupled weight decay."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from pybatch.optim._engine.arguments import check_betas, check_hyper
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class Adam(FusedOptimizer):
    """`torch.optim.Adam` in one fused pass (Kingma & Ba 2015, algorithm 1; `amsgrad`: Reddi et al. 2018).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in torch; betas are floats.
        foreach, fused: accepted for torch's sake and without effect; the pass is always fused.
        differentiable: must be False.
        decoupled_weight_decay: as in torch: True is `AdamW`; False adds the decay to the gradient.
        max_grad_norm, noise, master_weights, stochastic_rounding, backend: see `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    torch_flags: ClassVar[tuple[str, ...]] = ("foreach", "differentiable", "fused")
    rule_options: ClassVar[tuple[str, ...]] = ("amsgrad", "decoupled_weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        check_hyper(group, "eps")
        check_hyper(group, "weight_decay")

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        name = "AdamW" if group["decoupled_weight_decay"] else "Adam"
        if group["amsgrad"]:
            return ParamRule(name + "Amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
        return ParamRule(name, ("exp_avg", "exp_avg_sq"))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
