"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from pybatch.optim._engine.options import OwnOptions
from pybatch.optim.adam import Adam


class AdamW(Adam):
    """`torch.optim.AdamW` in one fused pass (Loshchilov & Hutter 2019; `amsgrad`: Reddi et al. 2018).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in torch; betas are floats.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

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
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=True,
            **own,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's: a state_dict of an Adam is gone on with by AdamW's rule."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
