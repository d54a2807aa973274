"""How states are kept between steps: in fp32, in bf16, or in 8 bits with a scale for each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pybatch import ops
from pybatch.optim._engine import sharding
from pybatch.optim._engine.options import Options, ParamRule
from pybatch.optim._engine.slots import Slot, fit_state

SCALE = "_scale"  # the scales of state "exp_avg" stand beside it as "exp_avg_scale"


class Kept(NamedTuple):
    """A state as the pass reads it; `scales` of 8 bits only."""

    state: torch.Tensor
    scales: torch.Tensor | None


def has_sign(rule: ParamRule, name: str) -> bool:
    """Whether a state of the rule can be negative."""
    return not ops.RULES[rule.name].squares >> rule.states.index(name) & 1


def fit(slot: Slot, own: Mapping[str, Any], rule: ParamRule, name: str, kind: str) -> Kept:
    """A state of a parameter in the layout of its memory, of this kind: zeros, or what was saved in whatever kind."""
    saved = own.get(name)
    if kind == "fp32" and not _is_codes(saved):
        return Kept(fit_state(slot, name, saved), None)
    if kind == "bf16" and not _is_codes(saved):
        return Kept(fit_state(slot, name, saved, torch.bfloat16), None)
    if _is_codes(saved):
        codes, scales = sharding.local(saved), own[name + SCALE]
        same = codes.shape == slot.shape and codes.stride() == slot.stride
        if kind == "8bit" and same and codes.device == scales.device == slot.device:
            return Kept(codes, scales)
        saved = ops.from_codes(codes, scales, has_sign=has_sign(rule, name))
        return fit(slot, {name: saved}, rule, name, kind)
    if saved is None:
        blocks = torch.zeros(ops.scale_count(slot.dense.numel()), device=slot.device)
        return Kept(ops.zeros_like(slot.dense, torch.uint8), blocks)
    return Kept(*ops.to_codes(fit_state(slot, name, saved), has_sign=has_sign(rule, name)))


def in_fp32(param: torch.Tensor, own: Mapping[str, Any], rule: ParamRule) -> dict[str, Any]:
    """A parameter's states as a checkpoint has them: fp32 under torch's names, without scales."""
    wide = dict(own)
    for name in rule.states:
        value = own.get(name)
        scales = wide.pop(name + SCALE, None)
        if _is_codes(value):
            value = ops.from_codes(sharding.local(value), scales, has_sign=has_sign(rule, name))
            wide[name] = sharding.like(param, value) if sharding.is_sharded(param) else value
        elif isinstance(value, torch.Tensor):
            wide[name] = value.to(torch.float32)
    return wide


def bytes_kept(param: torch.Tensor, rule: ParamRule, options: Options) -> int:
    """Bytes of memory that an optimizer keeps for a parameter: states, scales, master or remainder, staging."""
    local = sharding.local(param)
    elements = local.numel()
    width = {"fp32": 4, "bf16": 2, "8bit": 1}[options.state_dtype]
    total = len(rule.states) * elements * width
    if options.state_dtype == "8bit":
        total += len(rule.states) * 4 * ops.scale_count(elements)
    if local.dtype != torch.float32 and options.master_weights:
        total += elements * (2 if options.master_weights == "remainder" else 4)
    return total + (2 * elements if rule.then is not None else 0)


def _is_codes(saved: Any) -> bool:
    return isinstance(saved, torch.Tensor) and saved.dtype == torch.uint8
