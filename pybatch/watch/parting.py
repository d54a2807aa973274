"""Which numbers among a model's outputs are of which examples: told by passes in which half of the examples change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pybatch.base.errors import UsageError
from pybatch.noise.outputs import leaves_in
from pybatch.watch.batching import Batching, alternatives
from pybatch.watch.state import put_back

_SAID = 120  # characters of a model's own error


@dataclass(frozen=True)
class Parting:
    """The examples of one output: in a dimension of its own, or one they share with positions, say."""

    leaf: int  # of the output
    batching: Batching  # of the arguments
    dim: int  # of the output
    mixed: bool  # example i at i, i + n, i + 2n ...; else at m i, ..., m i + m - 1

    def second_half(self, output: Tensor, n: int) -> Tensor:
        """Whether a number is of the later examples, those from n // 2 on: bool, to be broadcast to the output.

        Raises:
            UsageError: the output is not of n examples.
        """
        size = output.shape[self.dim] if output.ndim > self.dim else 1
        if size % n:
            raise UsageError(f"an output of shape {tuple(output.shape)} does not follow a batch of {n} examples")
        place = torch.arange(size, device=output.device)
        example = place % n if self.mixed else place // (size // n)
        return (example >= n // 2).view([-1 if dim == self.dim else 1 for dim in range(output.ndim)])


def find_parting(model: nn.Module, arguments: Any, batching: Batching, leaf: int) -> Parting:
    """Where the examples of a batch are in one leaf of the output; all that the passes change is put back.

    Args:
        model: run twice, and twice for each dimension that may be the batch, without gradients.
        arguments: (args, kwargs) of a pass of two or more examples.
        batching: where their batch is taken to be.
        leaf: of the output.

    Raises:
        UsageError: examples enter one another's outputs, or their place there can't be told; the model does not run
            again, gives NaN, or another output each time.
    """
    name = type(model).__name__
    with put_back(model, ()), torch.no_grad():
        run = _Repeated(model, leaf)
        output, again = run(arguments), run(arguments)
        if output is None or again is None:
            scripted = isinstance(model, torch.jit.ScriptModule)
            unseen = ". What TorchScript is given by keyword is not seen: give it by place" if scripted else ""
            raise UsageError(f"{name} can't be run again to part its output by examples: {run.failed}{unseen}")
        if output.isnan().any():
            raise UsageError(f"the output of {name} holds NaN, and can't be parted by examples")
        if not torch.equal(output, again):
            raise UsageError(
                f"{name} gives another output each time it is run with the same arguments and random numbers: it keeps "
                "some state, or its kernels differ from run to run"
            )
        for candidate in (batching, *alternatives(arguments, batching)):
            found = _parted(run, output, arguments, candidate)
            if found is not None:
                return found
    if run.gave <= 2:  # those with the arguments as they were
        raise UsageError(f"{name} does not run with the examples in another order: {run.failed}")
    raise UsageError(
        f"the output of {name} can't be parted by examples: it is a loss already, or the examples of a "
        "batch enter one another's outputs"
    )


def _parted(run: _Repeated, output: Tensor, arguments: Any, batching: Batching) -> Parting | None:
    n = batching.size
    half, place = n // 2, torch.arange(n)
    earlier = torch.where(place < half, half + place % (n - half), place)  # the earlier half is of later examples
    later = torch.where(place < half, place, (place - half) % max(half, 1))
    changed = [run(_replaced(arguments, batching, order)) for order in (earlier, later)]
    if any(other is None or other.shape != output.shape for other in changed):
        return None
    first, second = (other != output for other in changed if other is not None)
    if not (first.any() and second.any()):
        return None
    for parting in _partings(run.leaf, batching, output):
        of_second = parting.second_half(output, n)
        if not (first & of_second).any() and not (second & ~of_second).any():
            return parting
    return None


def _partings(leaf: int, batching: Batching, output: Tensor) -> Iterator[Parting]:
    for dim, size in enumerate(output.shape):
        if size and size % batching.size == 0:
            yield Parting(leaf, batching, dim, mixed=False)
            if size > batching.size:
                yield Parting(leaf, batching, dim, mixed=True)


def _replaced(arguments: Any, batching: Batching, order: Tensor) -> Any:
    """The arguments with the examples in this order; they may come twice."""
    leaves, spec = tree_flatten(arguments)
    made = [
        leaf.index_select(dim, order.to(leaf.device)) if isinstance(leaf, Tensor) and dim is not None else leaf
        for leaf, dim in zip(leaves, batching.dims, strict=True)
    ]
    return tree_unflatten(made, spec)


class _Repeated:
    """Forward passes that draw the same random numbers; None where the model does not take the arguments.

    Attributes:
        gave: how many gave an output.
        failed: why the last that gave none did not.
    """

    def __init__(self, model: nn.Module, leaf: int) -> None:
        self._model, self.leaf, self.gave, self.failed = model, leaf, 0, ""
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        host, cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
        self._again: list[Callable[[], None]] = [lambda: torch.set_rng_state(host)]
        self._again += [lambda d=d, s=s: torch.cuda.set_rng_state(s, d) for d, s in cuda.items()]  # type: ignore[misc]

    def __call__(self, arguments: Any) -> Tensor | None:
        for draw in self._again:
            draw()
        args, kwargs = arguments
        try:
            output = leaves_in(self._model(*args, **kwargs))[self.leaf]
        except Exception as error:  # whatever a model makes of a wrong dimension
            self.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"
            return None
        if not isinstance(output, Tensor):
            self.failed = "an output is no tensor any more"
            return None
        self.gave += 1
        return output.detach().clone()
