"""What fp32 means to torch on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_fp32() -> Iterator[None]:
    """In this context fp32 has all of its bits: no TensorFloat-32, which cuDNN takes for convolutions by default."""
    cudnn = torch.backends.cudnn
    places: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
