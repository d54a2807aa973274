"""Settings of torch that change its numbers or its speed, and which of them differ from torch's own."""

from __future__ import annotations

import torch

# As torch is imported.
_OWN = {
    "torch.default_dtype": "float32",
    "torch.default_device": "cpu",
    "torch.deterministic_algorithms": "False",
    "torch.float32_matmul_precision": "highest",
    "torch.backends.cudnn.benchmark": "False",
    "torch.backends.cudnn.deterministic": "False",
}


def numerical() -> dict[str, str]:
    """Every such setting of this process, by name."""
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    return {
        "torch.default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "torch.default_device": str(torch.get_default_device()),
        "torch.deterministic_algorithms": "warn only" if strict and warned else str(strict),
        "torch.float32_matmul_precision": _matmul_precision(),
        "torch.backends.cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "torch.backends.cudnn.deterministic": str(torch.backends.cudnn.deterministic),
    }


def changed() -> dict[str, str]:
    """The settings that are not torch's own, for the record."""
    return {name: value for name, value in numerical().items() if value != _OWN[name]}


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer names, which this one refuses to read then
        return str(torch.backends.cuda.matmul.fp32_precision)
