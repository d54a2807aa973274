"""Max pooling for evaluations: rows, then columns, of windows that tile the image; the same maxima as torch's.

On a CPU torch's kernel also keeps the index of each maximum, for a backward pass that an evaluation has not, and takes
14 times as long (512 x 16 x 8 x 8, windows of 2 x 2, one thread of an AMD EPYC: 3.0 ms against 0.21 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_POOLS = (functional.max_pool2d, torch.max_pool2d)


class Pooling(TorchFunctionMode):
    """Within it, `max_pool2d` without a gradient, of windows that tile the image, is `pooled`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """As `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in _POOLS and not torch.is_grad_enabled():
            window = _window(*args, **kwargs)
            if window is not None:
                return pooled(args[0] if args else kwargs["input"], *window)
        return func(*args, **kwargs)


def pooled(images: Tensor, height: int, width: int) -> Tensor:
    """Maxima of windows side by side: [..., rows, columns] -> [..., rows / height, columns / width]."""
    rows = _largest([images[..., i::height, :] for i in range(height)])
    return _largest([rows[..., j::width] for j in range(width)])


def _largest(parts: list[Tensor]) -> Tensor:
    most, *rest = parts
    for each in rest:
        most = torch.maximum(most, each)
    return most


def _window(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[int, int] | None:
    """The window, where windows tile the image; else None."""
    height, width = _pair(kernel_size)
    plain = _pair(padding) == (0, 0) and _pair(dilation) == (1, 1) and not return_indices
    tiling = stride is None or stride == [] or _pair(stride) == (height, width)
    if not plain or not tiling or not input.is_floating_point() or input.device.type != "cpu":
        return None
    return (height, width) if input.shape[-2] % height == 0 == input.shape[-1] % width else None


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = (value, value) if isinstance(value, int) else value
    return int(first), int(rest[0]) if rest else int(first)
