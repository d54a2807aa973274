"""Lion: evolved sign momentum."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from pybatch.optim._engine.arguments import check_betas, check_hyper, check_torch_flags
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.options import Options, Rule


class Lion(FusedOptimizer):
    """Lion in one fused pass (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

    c = beta1 m + (1 - beta1) g;  p <- p (1 - lr wd) - lr sign(c);  m <- beta2 m + (1 - beta2) g.  sign(0) is 0.

    Args:
        params: as in torch.
        lr: every element moves by this much; the paper's advice is a third to a tenth of AdamW's.
        betas: rate of the momentum whose sign is taken, and of the one that is kept.
        weight_decay: decoupled, as AdamW's; three to ten times AdamW's, so that lr * weight_decay stays.
        maximize, capturable: as in torch.
        foreach, fused: accepted for torch's sake and without effect; the pass is always fused.
        differentiable: must be False.
        max_grad_norm, noise, master_weights, stochastic_rounding, backend: see `FusedOptimizer`.

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
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        noise: bool = False,
        master_weights: bool | Literal["remainder"] = False,
        stochastic_rounding: bool | int = False,
        backend: str | None = None,
    ) -> None:
        check_torch_flags(differentiable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        options = Options(
            max_grad_norm=max_grad_norm,
            noise=noise,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            backend=backend,
        )
        super().__init__(params, defaults, options)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(group["betas"], usual=(0.9, 0.99))
        check_hyper(group, "weight_decay")

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> Rule:
        return Rule("Lion", ("exp_avg",))

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: Rule) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2), group["weight_decay"]
