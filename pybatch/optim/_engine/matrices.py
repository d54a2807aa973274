"""Parameters as matrices: two dimensions, convolutions flattened, experts as a batch; gathered where sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from pybatch.optim._engine import sharding

PART = 1 << 26  # elements of gathered matrices that are whole at a time: 128 MiB in bf16


class Whole(NamedTuple):
    """What a first pass has staged of one parameter.

    Attributes:
        tensor: bf16, of the parameter's shape or that of its local shard.
        param: the parameter.
        group: torch's, that it is in.
    """

    tensor: torch.Tensor
    param: torch.Tensor
    group: dict[str, Any]


def is_matrix(shape: Sequence[int], flatten: bool | None) -> bool:
    """Whether a parameter of this shape is a matrix, or several; `flatten` as in `Muon`."""
    return len(shape) == 2 or (len(shape) > 2 and flatten is not None)


def size(shape: Sequence[int], flatten: bool | None) -> tuple[int, int]:
    """Rows and columns of each matrix of a parameter for which `is_matrix` holds."""
    return (shape[0], math.prod(shape[1:])) if flatten else (shape[-2], shape[-1])


def views(tensor: torch.Tensor, flatten: bool | None) -> list[torch.Tensor]:
    """The matrices of a contiguous tensor, sharing its memory."""
    if tensor.dim() == 2:
        return [tensor]
    return [tensor.flatten(1)] if flatten else list(tensor.flatten(0, -3).unbind())


def transform(staged: Sequence[Whole], change: Callable[[list[Whole]], None]) -> None:
    """Change all parameters by whole matrices; those that are spread over processes are gathered, a part at a time.

    Every process gathers the same matrices in the same order and keeps its own shard of the result.

    Args:
        staged: in an order that all processes have in common.
        change: in place, tensors that hold whole matrices.
    """
    spread = [_is_spread(each) for each in staged]
    change([each for each, apart in zip(staged, spread, strict=True) if not apart])
    for part in _parts([each for each, apart in zip(staged, spread, strict=True) if apart]):
        gathered = [each._replace(tensor=sharding.gather(each.param, each.tensor)) for each in part]
        change(gathered)
        for each, whole in zip(part, gathered, strict=True):
            each.tensor.copy_(sharding.shard(each.param, whole.tensor))


def _is_spread(each: Whole) -> bool:
    """Whether other processes hold parts of its matrices. Goes by the placements, which all processes agree on."""
    dims = len(each.param.shape)
    batch = 0 if dims == 2 or each.group["flatten"] else dims - 2  # dimensions that count matrices
    return any(dim >= batch for dim in sharding.sharded_dims(each.param))


def _parts(staged: list[Whole]) -> Iterator[list[Whole]]:
    part: list[Whole] = []
    elements = 0
    for each in staged:
        if part and elements + each.param.numel() > PART:
            yield part
            part, elements = [], 0
        part.append(each)
        elements += each.param.numel()
    if part:
        yield part
