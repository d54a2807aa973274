"""Calls back when torch is first imported: what a script sets before that import, such as OMP_NUM_THREADS, holds."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class AfterTorch(importlib.abc.MetaPathFinder):
    """Calls `then` once torch is imported; at once where it is already.

    Args:
        then: called with no argument.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        if "torch" in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the interface has it: torch's own, whose loader calls back."""
        if fullname != "torch":
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        plain, then = loader.exec_module, self._then

        def exec_module(module: ModuleType) -> None:
            plain(module)
            del loader.exec_module
            then()

        loader.exec_module = exec_module
        return spec

    def remove(self) -> None:
        """Wait no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
