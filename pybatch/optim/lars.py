"""LARS: layer-wise adaptive rate scaling."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine.arguments import check_hyper, check_skip, skipped
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class LARS(FusedOptimizer):
    """LARS in one fused pass (You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks").

    Algorithm 1: rate = trust |p| / (|g| + wd |p| + eps);  m <- momentum m + rate (g + wd p);  p <- p - lr m. The norms
    are of one parameter each, |g| after clipping; the rate is 1 where either is 0.

    Biases and the scales of normalization layers have no use for a rate of their own: by default every parameter with
    at most one dimension takes a step of plain momentum SGD, without weight decay.

    Args:
        params: as in torch.
        lr: global learning rate; a step moves a parameter by about lr * trust_coefficient of its norm, so values
            from 1 to 30 are usual.
        momentum: at least 0.
        weight_decay: coupled, and part of the local rate.
        trust_coefficient: the paper's eta, above 0.
        eps: added to the denominator of the local rate; the paper has none.
        nesterov: look ahead by the momentum, as `torch.optim.SGD` does.
        skip: None: parameters with at most one dimension are updated by plain momentum SGD; True: all of the group;
            False: none. An option of param groups too: {"params": biases, "skip": True}.
        maximize, capturable: as in torch.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    batch_rule: ClassVar[str] = "linear"
    rule_options: ClassVar[tuple[str, ...]] = ("skip",)

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        nesterov: bool = False,
        *,
        skip: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "skip": skip,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        for name in ("momentum", "weight_decay", "trust_coefficient", "eps"):
            check_hyper(group, name)
        check_skip(group["skip"])
        if group["trust_coefficient"] == 0:
            raise UsageError("trust_coefficient 0: nothing would move. The paper's is 0.001.")
        if group["nesterov"] and group["momentum"] <= 0:
            raise UsageError(
                f"nesterov=True with momentum {group['momentum']}: Nesterov needs a momentum above 0. "
                "Set momentum=0.9, or nesterov=False."
            )

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return ParamRule("SgdMomentum" if skipped(group, param) else "Lars", ("momentum_buffer",))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        if rule.name == "SgdMomentum":
            return {name: group[name] for name in ("momentum", "nesterov")} | {"dampening": 0.0, "weight_decay": 0.0}
        return {name: group[name] for name in ("momentum", "weight_decay", "trust_coefficient", "eps", "nesterov")}
