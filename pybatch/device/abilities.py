"""What torch can train on this processor. Torch is asked: which types oneDNN takes does not follow from CPU flags."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

_SIZE = 8  # of the input and the hidden state tried: what a library refuses is a type, not a shape


@cache
def refusal(layer: type[nn.LSTM | nn.GRU | nn.RNN], dtype: torch.dtype) -> str | None:
    """Why torch on this CPU trains no such layer under autocast to `dtype`, in torch's words; None where it does.

    oneDNN has LSTMs in bf16 and fp16 only for processors with AVX-512, and torch has no other way to run them there.
    """
    with torch.random.fork_rng(devices=[]):
        tried = layer(_SIZE, _SIZE)
        inputs = torch.zeros(1, 2, _SIZE)
    try:
        with torch.autocast("cpu", dtype):
            out, _ = tried(inputs)
        out.float().sum().backward()
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return None


def refused_layer(model: nn.Module, dtype: torch.dtype) -> tuple[str, str] | None:
    """The first layer of a model that this CPU does not train under autocast to `dtype`, and why; None: all can run."""
    for module in model.modules():
        for layer in (nn.LSTM, nn.GRU, nn.RNN):
            if isinstance(module, layer) and (why := refusal(layer, dtype)) is not None:
                return layer.__name__, why
    return None
