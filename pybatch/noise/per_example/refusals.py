"""Models whose per-example gradients are undefined or out of reach, found before anything is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.noise.per_example.layers import MICRO_BATCHES, batch_norm_refusal


def refuse_modules(model: nn.Module) -> None:
    """Raise UsageError naming the first module, or parameter, that can't be measured, with the reason and a remedy."""
    _refuse(model, _why_not)


def refuse_undefined(model: nn.Module) -> None:
    """The same, of those alone whose per-example gradients are not defined, however they are formed."""
    _refuse(model, _undefined)


def _refuse(model: nn.Module, why_not: Callable[[nn.Module], str | None]) -> None:
    for name, module in model.named_modules():
        why = why_not(module)
        if why is not None:
            raise UsageError(f"per-example norms: module {name or 'model'!r} ({type(module).__name__}): {why}")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise UsageError(f"per-example norms: parameter {name!r} is complex, which is not supported. Freeze it.")
        if hasattr(parameter, "full_tensor"):  # DTensor, whose module is not imported on every build of torch
            raise UsageError(
                f"per-example norms: parameter {name!r} is sharded (DTensor). Measure on the unsharded model."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("per-example norms: the model has no parameter that requires a gradient.")


def _undefined(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return batch_norm_refusal("training")
    return None


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _undefined(module)
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "it is compiled, and its operations can't be seen. Give the model before torch.compile."
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "its operations can't be seen in TorchScript. Give the Python module."
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"the steps of a fused recurrent layer can't be seen. {MICRO_BATCHES}."
    if isinstance(module, nn.MultiheadAttention):
        return (
            "its projections are inside one fused function, with the sequence before the batch. Write it with "
            f"nn.Linear and scaled_dot_product_attention, or: {MICRO_BATCHES[0].lower()}{MICRO_BATCHES[1:]}."
        )
    return None
