"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pybatch.optim.adam import Adam


class AdamW(Adam):
    """`torch.optim.AdamW` in one fused pass (Loshchilov & Hutter 2019; `amsgrad`: Reddi et al. 2018).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in torch; betas are floats.
        foreach, fused: accepted for torch's sake and without effect; the pass is always fused.
        differentiable: must be False.
        max_grad_norm, noise, master_weights, stochastic_rounding, backend: see `FusedOptimizer`.

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
        master_weights: bool | Literal["remainder"] = False,
        stochastic_rounding: bool | int = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            noise=noise,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's: a state_dict of an Adam is gone on with by AdamW's rule."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
