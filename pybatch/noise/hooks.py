"""Hooks of the one model they were put on."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_BESIDE = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_STATE = "__getstate__"


class Hook:
    """Calls `call`, but in the model it was put on alone.

    `copy.deepcopy(model)` (an average of weights, say) and a saved model take the model's hooks along where its class
    says itself what is copied. A copied handle would watch passes that are none of its training's, so there the hook
    does nothing.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class Placed:
    """A hook that was put on a model, until `remove`.

    Meanwhile copies and files of the model are as without it: `torch.load` of a whole model would else ask for pybatch,
    and refuse it with `weights_only=True`.
    """

    def __init__(self, model: nn.Module, handle: Any) -> None:
        self._model, self._handle = weakref.ref(model), handle
        if _STATE not in vars(model):
            vars(model)[_STATE] = _Unhooked(model)

    def remove(self) -> None:
        """Take it off, and with the last one what was changed of the model."""
        self._handle.remove()
        model = self._model()
        if model is not None and not _own(model) and isinstance(vars(model).get(_STATE), _Unhooked):
            del vars(model)[_STATE]


def before_forward(model: nn.Module, call: Callable[..., Any], **options: bool) -> Placed:
    """Call it where a forward pass of this model begins; options as of `register_forward_pre_hook`."""
    return Placed(model, model.register_forward_pre_hook(Hook(call), **options))


def after_forward(model: nn.Module, call: Callable[..., Any], **options: bool) -> Placed:
    """Call it after each forward pass of this model; options as of `register_forward_hook`."""
    return Placed(model, model.register_forward_hook(Hook(call), **options))


class _Unhooked:
    """A model's `__getstate__` without hooks of pybatch's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> Any:
        model: Any = self._model()
        kind: Any = type(model)
        found = kind.__getstate__(model)
        if not isinstance(found, dict):
            return found
        state, own = {name: value for name, value in found.items() if name != _STATE}, _own(model)
        for name in (*_TABLES, *_BESIDE):
            if name in state:
                state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in own)
        return state


def _own(model: nn.Module) -> set[int]:
    """Keys of the hooks that are pybatch's."""
    return {key for table in _TABLES for key, hook in vars(model)[table].items() if isinstance(hook, Hook)}
