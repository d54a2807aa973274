"""Floating-point operations of a piece of work, from the operators it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch._ops import HigherOrderOperator

from pybatch.capacity.flop_formulas import count, holds_products, known, masked
from pybatch.capacity.operators import Operators


def count_flops(work: Callable[[], object]) -> tuple[int | None, str | None]:
    """FLOPs of one call of `work` and a reason why the count is null or incomplete.

    Counts matrix products (sparse ones by the numbers stored), convolutions, attention and recurrent layers, a
    multiply-add as two. Element-wise work counts nothing, and what checkpointing runs again in the backward pass counts
    once, as is usual for model FLOPs (Chowdhery et al. 2022, PaLM, appendix B). Where an operator ran that must hold
    such products and has no formula, the count is None.
    """
    with _Counter() as counter:
        work()
    if counter.heavy:
        return None, f"no FLOP formula for {', '.join(sorted(counter.heavy))}"
    custom = ", ".join(sorted(counter.custom))
    return counter.flops, f"custom operators count nothing: {custom}" if custom else None


class _Counter(Operators):
    """Adds up the FLOPs of the operators run under it, and names those whose work is not known.

    torch's own FlopCounterMode also follows modules, which fails where a loss takes a gradient of its own.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.heavy: set[str] = set()
        self.custom: set[str] = set()
        self._product: tuple[int, int] | None = None  # the tensor that the newest product made, and its FLOPs

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = func if isinstance(func, HigherOrderOperator) else func.overloadpacket
        # A nested tensor has no sizes, nor do its operators show others.
        nested = any(isinstance(value, torch.Tensor) and value.is_nested for value in (*args, *kwargs.values()))
        if not (known(packet) or nested or packet is func) and func._can_decompose():
            with self:  # inference mode shows operators that others are behind
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        found = count(packet, args, kwargs, result) if not nested else None if _holds_products(packet) else 0
        product = self._product
        if product is not None and not (args and isinstance(args[0], torch.Tensor) and product[0] == args[0]._cdata):
            product = None
        if packet is torch.ops.aten.sparse_mask and product is not None and torch._C._current_graph_task_id() >= 0:
            found = masked(product[1], *args)
        if isinstance(result, torch.Tensor):
            scaled = packet is torch.ops.aten.mul and product is not None and not found  # by the factor of an addmm
            made = product[1] if scaled and product is not None else found
            self._product = (result._cdata, made) if made else None
        self._add(packet, found)
        return result

    def _add(self, packet: Any, found: int | None) -> None:
        namespace = str(packet).partition(".")[0]
        if found is not None:
            self.flops += 0 if _recomputing() else found
        elif not isinstance(packet, HigherOrderOperator) and namespace not in ("aten", "prim", "prims", "profiler"):
            self.custom.add(str(packet))
        elif known(packet) or _holds_products(packet):
            self.heavy.add(str(packet))


def _holds_products(packet: Any) -> bool:
    return holds_products(str(packet).rpartition(".")[2])


def _recomputing() -> bool:
    """Whether torch.utils.checkpoint runs a part of the forward pass again, by the functions that do.

    The older, reentrant kind runs it in a backward function, and in the same one a backward pass of its own.
    """
    if torch._C._current_graph_task_id() < 0:
        return False
    again = {"recompute_fn", "unpack_hook", "backward"}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in again and code.co_filename == torch.utils.checkpoint.__file__:
            return True
        if code.co_name == "_engine_run_backward":
            again.discard("backward")
        frame = frame.f_back
    return False
