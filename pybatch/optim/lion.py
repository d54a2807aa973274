"""Lion: evolved sign momentum."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch

from pybatch.optim._engine.arguments import check_betas, check_hyper
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import OwnOptions, ParamRule


class Lion(FusedOptimizer):
    """Lion in one fused pass (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

    c = beta1 m + (1 - beta1) g;  p <- p (1 - lr wd) - lr sign(c);  m <- beta2 m + (1 - beta2) g.  sign(0) is 0.

    Args:
        params: as in torch.
        lr: every element moves by this much; the paper's advice is a third to a tenth of AdamW's.
        betas: rate of the momentum whose sign is taken, and of the one that is kept.
        weight_decay: decoupled, as AdamW's; three to ten times AdamW's, so that lr * weight_decay stays.
        maximize, capturable: as in torch.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range.
    """

    rule_options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **own)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"], usual=(0.9, 0.99))
        check_hyper(group, "weight_decay")

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        return ParamRule("Lion", ("exp_avg",))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
