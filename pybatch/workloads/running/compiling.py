"""torch.compile at fixed shapes: every batch size is a graph of its own. torch's compiler is imported when used."""

from __future__ import annotations

from typing import cast

import torch

_BACKEND = "inductor"
_LIMIT = 64  # batch sizes compiled for one model; torch's own limit of 8 is below what a search for the range meets


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model as torch.compile runs it, sharing parameters and buffers; compiled at the first call of each shape."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, _LIMIT)
    return cast(torch.nn.Module, torch.compile(model, dynamic=False, backend=_BACKEND))


def graphs_compiled() -> int:
    """Graphs compiled in this process so far: unchanged by a first call, that call ran eagerly."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compiler_failure(error: BaseException | None) -> str | None:
    """What an error of torch's compiler says, in one line; None for any other error."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(said[:2])}"
