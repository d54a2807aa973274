"""Floating-point operations of a piece of work, from the operators it runs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Operators that are matrix products inside but that neither torch's table nor ours has a formula for.
_HEAVY = ("rnn", "lstm", "gru", "attention", "conv", "matmul", "_mm", "mm_", "cdist", "fft", "linalg", "bilinear")


def count_flops(work: Callable[[], object]) -> tuple[int | None, str | None]:
    """FLOPs of one call of `work` and a reason why the count is null or incomplete.

    Counts matrix products, convolutions, attention and recurrent layers (torch.utils.flop_counter and the formulas
    below), a multiply-add as two; element-wise work counts nothing, as is usual for model FLOPs. Where an operator
    ran that must hold such products and has no formula, the count is None.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS)) as counter, _Uncounted() as uncounted:
        work()
    if uncounted.heavy:
        return None, f"no FLOP formula for {', '.join(sorted(uncounted.heavy))}"
    custom = ", ".join(sorted(uncounted.custom))
    return int(counter.get_total_flops()), f"custom operators count nothing: {custom}" if custom else None


class _Uncounted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names the operators without a formula whose work should have been counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heavy: set[str] = set()
        self.custom: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        namespace, _, name = str(packet).partition(".")
        if packet not in flop_registry and packet not in _FORMULAS:
            if namespace not in ("aten", "prim", "prims", "profiler"):
                self.custom.add(str(packet))
            elif any(part in name for part in _HEAVY):
                self.heavy.add(str(packet))
        return func(*args, **(kwargs or {}))


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _rnn_layer(inputs: Any, weight_in: Any, weight_hidden: Any, *_: Any, **__: Any) -> int:
    """One recurrent layer over [t, n, features]: two products per step with the stacked gate matrices."""
    return int(2 * prod(inputs[:2]) * (prod(weight_in) + prod(weight_hidden)))


def _rnn_layer_backward(inputs: Any, weight_in: Any, weight_hidden: Any, *_: Any, **__: Any) -> int:
    """Each product of the forward pass has two: for its input and for its weight."""
    return 2 * _rnn_layer(inputs, weight_in, weight_hidden)


# The CPU's own operators, which torch's table leaves out. Formulas get shapes in place of tensors.
_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    torch.ops.aten.mkldnn_rnn_layer: _rnn_layer,
    torch.ops.aten.mkldnn_rnn_layer_backward: _rnn_layer_backward,
}
