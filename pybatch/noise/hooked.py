"""Tensors inside a graph whose gradients a script looks at: by a hook, or kept in `.grad`."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor

_NAMES = ("register_hook", "retain_grad")
_OWN = __name__.partition(".")[0] + "."


class Hooked:
    """Notes them from `start` to `stop`, until `clear`. Of hooks on nodes of the graph it knows nothing.

    A node can't be asked for its hooks, so both methods of a tensor are watched. What is noted is the number of a node,
    which holds no graph.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, str] = {}  # what was called, by the number of the tensor's node

    def start(self) -> None:
        """Look at what is called from now on."""
        if not _watching:
            _put_on()
        _watching.add(self)

    def stop(self) -> None:
        """Look no more."""
        _watching.discard(self)
        if not _watching:
            _take_off()

    def clear(self) -> None:
        """Forget what was noted: those graphs are gone."""
        self._nodes.clear()

    def below(self, node: Any) -> str | None:
        """What was called of a tensor in the graph from this node on; None: nothing."""
        waiting, seen = [node] if self._nodes else [], set()
        while waiting:
            one = waiting.pop()
            if one is None or one in seen:
                continue
            seen.add(one)
            found = self._nodes.get(one._sequence_nr())
            if found is not None:
                return found
            waiting += [after for after, _ in one.next_functions]
        return None

    def note(self, tensor: Tensor, name: str) -> None:
        """A method of this name was called."""
        if tensor.grad_fn is not None:
            self._nodes[tensor.grad_fn._sequence_nr()] = name


_watching: weakref.WeakSet[Hooked] = weakref.WeakSet()
_put: dict[str, tuple[Any, Any]] = {}  # by name: what stood in the class itself, and what stands in its place


def _put_on() -> None:
    for name in _NAMES:
        before, plain = vars(Tensor).get(name), getattr(Tensor, name)
        if name in _put and before is _put[name][1]:
            continue  # left over from one that was never stopped
        made = _noting(name, plain)
        _put[name] = before, made
        setattr(Tensor, name, made)


def _take_off() -> None:
    """Unless another has wrapped them meanwhile."""
    for name, (before, made) in list(_put.items()):
        if vars(Tensor).get(name) is not made:
            continue
        if before is None:
            delattr(Tensor, name)
        else:
            setattr(Tensor, name, before)
        del _put[name]


def _noting(name: str, plain: Any) -> Any:
    @functools.wraps(plain)
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = plain(tensor, *args, **kwargs)
        hook = args[0] if args else kwargs.get("hook")
        if not str(getattr(hook, "__module__", "")).startswith(_OWN):
            for one in list(_watching):
                one.note(tensor, name)
        return made

    return call
