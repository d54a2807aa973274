"""Checks of what a user passes to an optimizer."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from pybatch.base.errors import UsageError
from pybatch.base.plain import given, said


def check_count(n: Any) -> float:
    """Examples of a micro-batch as a float; raises UsageError unless it is a number above 0 that the host can read."""
    if is_device_scalar(n):
        raise UsageError(f"accumulate(): n is a tensor on {n.device}, reading it would wait. Pass a number: len(x).")
    known = isinstance(n, Real) or (isinstance(n, torch.Tensor) and n.dim() == 0 and not n.is_complex())
    if not (known and math.isfinite(n) and n > 0):
        what = f"a tensor of shape {tuple(n.shape)}" if isinstance(n, torch.Tensor) and n.dim() else said(n)
        raise UsageError(f"accumulate(): {what} is no number of examples in the micro-batch, above 0. Pass len(x).")
    return float(n)


def is_device_scalar(value: Any) -> bool:
    """Whether reading this number would wait for a device."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def check_hyper(group: dict[str, Any], name: str) -> None:
    """Raise UsageError unless a hyper-parameter is one number of at least 0; one on a device is not read."""
    value = group[name]
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise UsageError(f"{name} is a tensor of shape {tuple(value.shape)}: it must hold one number.")
    if is_device_scalar(value):
        return
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise UsageError(f"{name} is {given(value)}. Give a number of at least 0.")
    if math.isnan(value):
        raise UsageError(f"{name} {value} is not a number. Give one of at least 0.")
    if not float(value) >= 0.0:
        raise UsageError(f"{name} {value}: it must be at least 0.")


def check_betas(betas: Any, usual: tuple[float, ...] = (0.9, 0.999)) -> None:
    """Raise UsageError unless these are as many numbers as usual, each from 0 to below 1."""
    enough = isinstance(betas, (tuple, list)) and len(betas) == len(usual)
    if not enough or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
        raise UsageError(f"betas {betas}: give {len(usual)}, each at least 0 and below 1. The usual ones are {usual}.")


def check_capturable(groups: list[dict[str, Any]], device: torch.device) -> None:
    """Refuse capturable=True where there are no graphs to capture, as torch does at the first step."""
    if device.type != "cuda" and any(group.get("capturable") for group in groups):
        raise UsageError(f"capturable=True: the parameters are on {device}, only CUDA has graphs. Leave it out.")


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
