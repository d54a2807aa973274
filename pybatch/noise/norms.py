"""Squared norms of gradients, exact enough to be subtracted from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROW = 4096  # elements summed in fp32 before fp64 takes over: relative error of a norm below 1e-6
KNOWN = 256  # lists of columns remembered: more than a model has buckets
SMALL = 1 << 16  # elements up to which one launch for many tensors beats one for each


def _products(dtype: torch.dtype, scaled: bool) -> torch.dtype:
    """What squares are taken in. Gradients of a scaled loss may be past 2^64 in fp32 and bf16; fp16 ends at 65504."""
    return torch.float64 if dtype == torch.float64 or (scaled and dtype != torch.float16) else torch.float32


def stored(grad: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient that may be other than zero: of a sparse one its rows, each once and whole."""
    return grad.coalesce().values() if grad.is_sparse else grad


def square(tensor: torch.Tensor, scaled: bool = False) -> torch.Tensor:
    """Sum of squares: 0-d float64 on the tensor's device, products in fp32 or better, without a copy of a dense tensor.

    Args:
        tensor: of any shape, sparse too.
        scaled: a gradient of a scaled loss: no square of a finite number overflows.
    """
    flat = stored(tensor.detach()).reshape(-1)
    wide = _products(flat.dtype, scaled)
    whole = flat.numel() - flat.numel() % ROW
    parts = []
    if whole:
        parts.append(torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=wide))
    if whole < flat.numel():
        parts.append(torch.linalg.vector_norm(flat[whole:], dtype=wide).reshape(1))
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=flat.device)
    return torch.cat(parts).double().square().sum()


def squares(tensors: Sequence[torch.Tensor], scaled: bool = False) -> torch.Tensor:
    """Sums of squares of many tensors on one device, each as `square` takes it: [len(tensors)] float64."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    found: dict[int, torch.Tensor] = {}
    tensors = [stored(tensor) for tensor in tensors]
    for wide in (torch.float32, torch.float64) if scaled else (torch.float32,):
        small = [i for i, t in enumerate(tensors) if 0 < t.numel() <= SMALL and _products(t.dtype, scaled) == wide]
        if small:
            norms = torch._foreach_norm([tensors[i].detach() for i in small], 2, dtype=wide)
            found |= zip(small, torch.stack(norms).double().square().unbind(), strict=True)
    return torch.stack([found[i] if i in found else square(t, scaled) for i, t in enumerate(tensors)])


class Places:
    """Lists of columns as index tensors on a device; the same lists come again in every step, and a copy waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, columns: Sequence[int]) -> torch.Tensor:
        """[len(columns)] int64 on the device."""
        key = tuple(columns)
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = torch.tensor(key, dtype=torch.long, device=self._device)
        return self._known[key]
