"""Adam with Nesterov momentum."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from pybatch.optim._engine.arguments import check_betas, check_hyper
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class NAdam(FusedOptimizer):
    """`torch.optim.NAdam` in one fused pass (Dozat 2016, "Incorporating Nesterov Momentum into Adam").

    The momentum grows along the run, mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2), and a step looks ahead by it: the
    mean of gradient and first moment that is divided by the root of the second has the shares (1 - mu_t) and mu_{t+1}.

    Args:
        params, lr, betas, eps, weight_decay, momentum_decay, maximize, capturable: as in torch; betas are floats.
        decoupled_weight_decay: as in torch: True scales the parameter as AdamW does; False adds the decay to the
            gradient.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    torch_flags: ClassVar[tuple[str, ...]] = ("foreach", "differentiable")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        for name in ("eps", "weight_decay", "momentum_decay"):
            check_hyper(group, name)

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return ParamRule("NAdam", ("exp_avg", "exp_avg_sq"), scalar="mu_product")

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        names = ("eps", "weight_decay", "momentum_decay", "decoupled_weight_decay")
        return {"beta1": beta1, "beta2": beta2} | {name: group[name] for name in names}
