"""DTensor parameters (FSDP2, tensor parallelism): local shards are updated, squared norms summed over the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pybatch.base.errors import UsageError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> torch.Tensor:
    """The local shard of a DTensor, without a graph; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[no-any-return]


def check(what: str, param: Any) -> None:
    """Raise UsageError for a parameter that is a sum not yet taken."""
    if any(placement.is_partial() for placement in param.placements):
        raise UsageError(
            f"{what} is a DTensor with placements {param.placements}: what each process holds is part of a sum. "
            "Redistribute it to Shard or Replicate."
        )


def local_gradient(what: str, param: Any, grad: Any) -> torch.Tensor:
    """The local shard of a gradient, placed as its parameter; sums a partial one over the mesh."""
    if not is_sharded(grad):
        raise UsageError(f"{what} is a plain tensor, the parameter a DTensor. Make one as the other is.")
    if grad.device_mesh != param.device_mesh:
        raise UsageError(f"{what} is on another device mesh than the parameter. Redistribute it.")
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def like(param: Any, value: torch.Tensor) -> torch.Tensor:
    """A DTensor around a local tensor, placed as the parameter: checkpoints then know it is a shard."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def sharded_dims(param: Any) -> list[int]:
    """Dimensions of a parameter along which several processes hold parts of it; empty for a plain tensor."""
    if not is_sharded(param):
        return []
    sizes = param.device_mesh.shape
    return [
        placement.dim % len(param.shape)
        for placement, size in zip(param.placements, sizes, strict=True)
        if size > 1 and not placement.is_replicate()
    ]


def gather(param: Any, value: torch.Tensor) -> torch.Tensor:
    """All of what is placed as the parameter, from every process's local tensor; contiguous, of the parameter's shape.

    A collective over the parameter's mesh. Shards may be uneven or empty.
    """
    from torch.distributed.tensor import DTensor

    stride = torch.empty(param.shape, device="meta").stride()
    placed = DTensor.from_local(
        value.contiguous(), param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=stride
    )
    return placed.full_tensor().contiguous()


def shard(param: Any, whole: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that every process has, placed as the parameter; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(placements=param.placements))


class Processes:
    """The processes that hold shards of an optimizer's parameters.

    Args:
        params: its parameters; at least one is a DTensor.

    Raises:
        UsageError: their meshes are not parts of one of them.
    """

    def __init__(self, params: Sequence[Any]) -> None:
        meshes = [param.device_mesh for param in params if is_sharded(param)]
        self.mesh = max(meshes, key=lambda mesh: mesh.size())
        ranks = set(self.mesh.mesh.flatten().tolist())
        for mesh in meshes:
            if not set(mesh.mesh.flatten().tolist()) <= ranks:
                raise UsageError(
                    f"parameters are on the meshes {mesh} and {self.mesh}, of which neither holds the other: their "
                    "norms can't be summed at once. Use one optimizer per mesh."
                )

    def share(self, param: Any) -> float:
        """This process's share of a parameter's squares: 1, or less where other processes hold the same elements."""
        held = 1  # processes over which its elements are spread
        if is_sharded(param):
            for dimension, placement in enumerate(param.placements):
                held *= param.device_mesh.size(dimension) if not placement.is_replicate() else 1
        return held / float(self.mesh.size())

    def reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors of one dtype over all processes of the mesh, in place and as one message a dimension."""
        import torch.distributed as dist

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(flat, group=self.mesh.get_group(dimension))
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def processes(params: Sequence[torch.Tensor]) -> Processes | None:
    """The processes of these parameters; None where none is a DTensor."""
    return Processes(params) if any(is_sharded(param) for param in params) else None
