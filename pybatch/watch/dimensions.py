"""Which of two dimensions of one size is the batch: told by the kept pass at another batch size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from pybatch.watch.batching import Batching, alternatives, batch_in_layer
from pybatch.watch.passes import Loaded, Pass


def settled(kept: Pass) -> Batching:
    """The batch dimensions of the kept pass, which is run where a tensor has the batch size in two of them.

    Tokens [20, 20] may be [length, batch] or [batch, length]. What the model doesn't take in one of them is the other;
    where it takes both, recurrent and attention layers tell, which know the place of the batch in their input. To be
    called where all that a pass changes is put back; gradients are let go.
    """
    ran: list[Batching] = []
    for batching in (kept.batching, *(others := alternatives(kept.arguments, kept.batching))):
        if not others:
            break
        found = _takes(replace(kept, batching=batching))
        if found:
            return batching
        ran += [batching] if found is False else []
    return ran[0] if ran else kept.batching


def _takes(kept: Pass) -> bool | None:
    """Whether the model takes half of the batch, and its layers meet so many; None: it does not."""
    size = kept.batching.size
    n = size // 2 if size >= 4 else 2 * size  # no single example: batch normalization has none
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
