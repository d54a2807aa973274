"""Hooks of the one model they were put on."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_BESIDE = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_ASKED = ("get_hook_stubs", "infer_concrete_type_builder")  # by torch.jit.script, of a module's hooks
_PROTOCOL = 2  # of pickle: what an object gives for it is valid in all later ones
_hooked: Counter[type] = Counter()  # hooks by class of their models, where `_reduced` stands


class Hook:
    """Calls `call`, but in the model it was put on alone.

    `copy.deepcopy(model)` (an average of weights, say) and a saved model take the model's hooks along where its class
    says itself what is copied. A copied handle would watch passes that are none of its training's, so there the hook
    does nothing; in a file it is of the standard library, as there may be no pybatch where that is read.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self._call is None else self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes any arguments, and returns None


class Placed:
    """A hook that was put on a model, until `remove`.

    Meanwhile copies and files of the model are as without it: `torch.load` of a whole model would else find a hook, and
    refuse it with `weights_only=True`. Nothing is put into the model for that, as classes of others' copy what they
    find there: how a model of this class is copied and pickled is asked of `copyreg`.
    """

    def __init__(self, model: nn.Module, handle: Any) -> None:
        _let_script()
        # torch counts keys up from 0, in each process anew: below that none of a file's can be another hook's.
        key, handle.id = handle.id, ~handle.id
        for name in (*_TABLES, *_BESIDE):
            table = vars(model).get(name, {})
            if key in table:
                table[handle.id] = table.pop(key)
        self._handle, kind = handle, type(model)
        if kind not in copyreg.dispatch_table:  # one of the script's own says what is copied
            copyreg.pickle(kind, _reduced)
        if copyreg.dispatch_table[kind] is _reduced:
            _hooked[kind] += 1
            self._forget = weakref.finalize(model, _forget, kind)
            self._forget.atexit = False

    def remove(self) -> None:
        """Take it off, and with the last one what was said of the model's class."""
        self._handle.remove()
        if hasattr(self, "_forget"):
            self._forget()


def transformed() -> bool:
    """Whether a pass is under way within torch.func (vmap, grad, ...), of which none is a step of a training."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def before_forward(model: nn.Module, call: Callable[..., Any], **options: bool) -> Placed:
    """Call it where a forward pass of this model begins; options as of `register_forward_pre_hook`."""
    return Placed(model, model.register_forward_pre_hook(Hook(call), **options))


def after_forward(model: nn.Module, call: Callable[..., Any], **options: bool) -> Placed:
    """Call it after each forward pass of this model; options as of `register_forward_hook`."""
    return Placed(model, model.register_forward_hook(Hook(call), **options))


def _forget(kind: type) -> None:
    """One hook less on models of this class."""
    _hooked[kind] -= 1
    if _hooked[kind]:
        return
    del _hooked[kind]
    if copyreg.dispatch_table.get(kind) is _reduced:
        del copyreg.dispatch_table[kind]


def _reduced(model: nn.Module) -> Any:
    """What a model is copied and pickled by, as it says itself, without hooks of pybatch's."""
    found = model.__reduce_ex__(_PROTOCOL)
    return found if isinstance(found, str) else tuple(_unhooked(part) for part in found)


def _unhooked(part: Any) -> Any:
    """The same without them: a module's attributes, alone or in a tuple, as of arguments and of states with slots."""
    if type(part) is tuple:
        return tuple(_unhooked(one) for one in part)
    if not isinstance(part, dict) or not isinstance(part.get(_TABLES[0]), dict):
        return part
    own = {key for name in _TABLES for key, hook in part.get(name, {}).items() if isinstance(hook, Hook)}
    tables = {name: part[name] for name in (*_TABLES, *_BESIDE) if name in part}
    if not own:
        return part
    return part | {
        name: OrderedDict((key, value) for key, value in table.items() if key not in own)
        for name, table in tables.items()
    }


def _let_script() -> None:
    """Let `torch.jit.script` take a model with hooks of pybatch's: it compiles, and keeps, all that it finds.

    What it finds is asked of functions of torch's own; where there are none of these names, it is as torch has it.
    """
    scripting = sys.modules.get("torch.jit._recursive")
    for name in _ASKED:
        found = getattr(scripting, name, None)
        if found is not None and not getattr(found, "without_pybatch", False):
            setattr(scripting, name, _without_ours(found))


def _without_ours(asks: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a module, who finds no hooks of pybatch's on it."""

    @functools.wraps(asks)
    def without(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tables = {name: vars(module)[name] for name in (*_TABLES, *_BESIDE) if name in vars(module)}
        vars(module).update(_unhooked(tables))
        try:
            return asks(module, *args, **kwargs)
        finally:
            vars(module).update(tables)

    without.without_pybatch = True  # type: ignore[attr-defined]
    return without
