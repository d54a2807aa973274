"""Which parameters a layer-wise optimizer updates without a rate of their own: the option "skip" of LARS and LAMB."""

from __future__ import annotations

from typing import Any

import torch

from pybatch.base.errors import UsageError


def skipped(group: dict[str, Any], param: torch.Tensor) -> bool:
    """Whether a parameter is left out of layer-wise rates: by its group's "skip", or by its dimensions."""
    return param.dim() <= 1 if group["skip"] is None else bool(group["skip"])


def check_skip(value: Any) -> None:
    """Raise UsageError unless a group's "skip" is None, True or False."""
    if value is not None and not isinstance(value, bool):
        raise UsageError(
            f"skip {value!r}: it is None (parameters with at most one dimension), True (all) or False (none). "
            'Put the parameters to skip into a group of their own: {"params": [...], "skip": True}.'
        )
