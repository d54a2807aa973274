"""The operators of torch that a piece of work runs, one after the other."""

from __future__ import annotations

from typing import Any

from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives `run` each operator that computes something.

    A tensor made of others (jagged, sharded) runs operators of theirs, which are seen in place of its own; fake tensors
    compute nothing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **(kwargs or {}))
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and take note of it."""
        raise NotImplementedError
