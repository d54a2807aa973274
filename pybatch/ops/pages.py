"""Memory of the CPU in pages of 2 MB where the kernel gives them: a step that streams through pages of 4 KB waits for
their addresses to be looked up (bench/results/NOTES.md)."""

from __future__ import annotations

import ctypes
import mmap

import torch

_PAGE = 2 << 20
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
_libc = ctypes.CDLL(None) if _HUGE is not None else None


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As torch's, with memory asked for in huge pages; a request only, which changes no value and no size.

    It must come before the first write: only then does the kernel choose pages.
    """
    made = torch.empty_like(tensor, dtype=dtype)
    if _libc is not None and made.device.type == "cpu" and made.layout is torch.strided:
        begin = made.data_ptr()
        first, end = -(-begin // _PAGE) * _PAGE, (begin + made.untyped_storage().nbytes()) // _PAGE * _PAGE
        if end > first:
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _HUGE)  # refused: pages as they are
    return made


def zeros_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As torch's, with memory as `empty_like`."""
    return empty_like(tensor, dtype).zero_()
