"""Which of two dimensions of one size is the batch: told by the kept pass at another batch size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from pybatch.watch.batching import Batching, alternatives, batch_in_layer
from pybatch.watch.passes import Loaded, Pass
from pybatch.watch.together import Together

_HALVED = 4  # examples: of fewer, half would be a single one, which batch normalization refuses


def on_gpu(kept: Pass) -> bool:
    """Whether an index past a table would end all that this process can do with the device."""
    return any(p.is_cuda for p in kept.model.parameters())


def settled(kept: Pass, late: Callable[[], bool] = lambda: False) -> Batching:
    """The batch dimensions of the kept pass, which is run where a tensor has the batch size in two of them.

    Tokens [20, 20] may be [length, batch] or [batch, length]. What the model doesn't take in one of them is the other;
    where it takes both, recurrent and attention layers tell, which know the place of the batch in their input. To be
    called where all that a pass changes is put back; gradients are let go.

    Args:
        kept: the pass.
        late: whether there is no time for one more.
    """
    ran: list[Batching] = []
    for batching in (kept.batching, *(others := alternatives(kept.arguments, kept.batching))):
        if not others or late() or (kept.batching.size < _HALVED and on_gpu(kept)):
            break
        found = _takes(replace(kept, batching=batching))
        if found:
            return batching
        ran += [batching] if found is False else []
    return ran[0] if ran else kept.batching


def agreed(kept: Pass, together: Together, late: Callable[[], bool] = lambda: False) -> Batching:
    """The batch dimensions of a pass that several processes run together, each on examples of its own.

    Where one has a square, and another's sequences are longer or shorter, the other knows. Under DDP each tries its own
    passes besides, on the module inside, which waits for nobody; of a sharded model they would have to be the same.

    Args:
        kept: the pass of this process.
        together: all of them.
        late: as of `settled`.
    """
    model, own = kept.model, kept.batching
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not any(isinstance(module, FSDPModule) for module in inner.modules()):
        own = settled(replace(kept, model=inner), late)
    square = bool(alternatives(kept.arguments, kept.batching))
    found: list[tuple[bool, tuple[int | None, ...]]] = together.all((square, own.dims))
    dims = min(found, key=lambda one: one[0])[1]  # the first that is no square, or the first of all
    leaves = tree_leaves(kept.arguments)
    sizes = {
        leaf.shape[dim]
        for leaf, dim in zip(leaves, dims, strict=False)
        if dim is not None and isinstance(leaf, Tensor) and leaf.ndim > dim
    }
    return Batching(sizes.pop(), dims) if len(leaves) == len(dims) and len(sizes) == 1 else own


def _takes(kept: Pass) -> bool | None:
    """Whether the model takes half of the batch, and its layers meet so many; None: it does not."""
    size = kept.batching.size
    n = size // 2 if size >= _HALVED else 2 * size
    met: list[int] = []

    def see(module: nn.Module, args: Any) -> None:
        if (found := batch_in_layer(module, args)) is not None:
            met.append(found[0])

    with ExitStack() as stack:
        for module in kept.model.modules():
            stack.callback(module.register_forward_pre_hook(see).remove)
        try:
            Loaded(kept, n).run()
        except Exception:  # whatever a model makes of a wrong dimension
            return None
        finally:
            for p in kept.model.parameters():
                p.grad = None
    return not met or n in met
