"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine.arguments import check_hyper
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class SGD(FusedOptimizer):
    """`torch.optim.SGD` in one fused pass (Sutskever et al. 2013 for momentum; decay is coupled, as in torch).

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    batch_rule: ClassVar[str] = "linear"  # Goyal et al. 2017
    torch_flags: ClassVar[tuple[str, ...]] = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_hyper(group, "momentum")
        check_hyper(group, "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise UsageError(
                f"nesterov=True with momentum {group['momentum']} and dampening {group['dampening']}: Nesterov needs "
                "a momentum above 0 and no dampening. Set momentum=0.9, dampening=0, or nesterov=False."
            )

    @classmethod
    def _rule_key(cls, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["momentum"] != 0,)  # schedulers as OneCycleLR change it in every step

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return (
            ParamRule("SgdMomentum", ("momentum_buffer",), counts=False) if group["momentum"] != 0 else ParamRule("Sgd")
        )

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        return {name: group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov")}
