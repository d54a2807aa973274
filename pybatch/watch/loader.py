"""How long a script waits for torch's DataLoader, and with how many workers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from torch.utils.data import dataloader


class LoaderWatch:
    """Times every `next()` of every DataLoader, until `remove`.

    Args:
        waited: called with the seconds of each.
    """

    def __init__(self, waited: Callable[[float], None]) -> None:
        self.workers: int | None = None  # of the last loader that was asked
        self._plain = plain = dataloader._BaseDataLoaderIter.__next__

        @functools.wraps(plain)
        def timed(iterator: Any) -> Any:
            began = time.perf_counter()
            batch = plain(iterator)  # the end of an epoch, and what a data set raises, is no waiting
            waited(time.perf_counter() - began)
            self.workers = getattr(iterator, "_num_workers", None)
            return batch

        self._timed = timed
        dataloader._BaseDataLoaderIter.__next__ = timed  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Time no more, unless another has wrapped it meanwhile."""
        if dataloader._BaseDataLoaderIter.__next__ is self._timed:
            dataloader._BaseDataLoaderIter.__next__ = self._plain  # type: ignore[method-assign]
