"""What a training's own loss makes of a batch: whether examples meet in it, and labels it leaves out.

A noise scale takes the loss for a mean over examples, each of which counts by itself. The model does not tell: the loss
is computed outside of it. So the first backward passes are looked at where they begin: the loss is known then, and its
graph, which leads down to the model's outputs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pybatch.noise.hooks import after_forward, transformed
from pybatch.noise.labels import masked, ragged
from pybatch.noise.outputs import leaves_in
from pybatch.records import Note

COUPLED = Note(
    "noise.b_simple",
    "the loss couples the examples of a batch (as contrastive losses and in-batch negatives do): its gradient is not "
    "the mean of theirs, so the scale holds for micro-batches of this size alone, and predicts no critical batch",
)
_LOOKS = 2  # backward passes looked at
_PASSES = 8  # forward passes, after which a training is no more looked at whose backward passes can't be seen
_WAITING = 4  # of them whose outputs are kept for one backward pass
_LARGEST = 1 << 22  # numbers in the outputs, above which second derivatives would take memory that may be missed
_APART = 0.01  # of the second derivatives between one part of the examples and all that are between it and the rest
_NODES = 1000  # of a loss's graph that are looked at
_MEAN = 1  # torch's number for reduction="mean"

_looking: weakref.WeakSet[Loss] = weakref.WeakSet()
_plain: Any = torch.Tensor.backward  # what stood where ours stands
_placed = False  # whether ours stands there, or under what others have put over it


class Loss:
    """Looks at the first backward passes of a model's training.

    Nothing waits for the device until `notes` is called, and no gradient of a parameter is computed.

    Args:
        model: whose outputs the loss is made of.
    """

    def __init__(self, model: nn.Module) -> None:
        # In what it gives the hooks that are on the outputs may see a pass more; None: they may not.
        self.aside: Callable[[], AbstractContextManager[None] | None] = lambda: None
        self._looks = self._passes = 0
        self._outputs: deque[tuple[int, list[tuple[Tensor, int]]]] = deque(maxlen=_WAITING)  # and how many hooks each
        self._coupled: list[Tensor] = []
        self._ignored: list[tuple[int, Tensor]] = []  # ignore index, whether labels hold it unevenly
        self._unused: list[Tensor] = []  # whether the gradient is 0 at more of one example's outputs than of another's
        # TorchScript's modules take no hook at the end of a pass.
        scripted = isinstance(model, torch.jit.ScriptModule)
        self._hook = None if scripted else after_forward(model, self._forward, with_kwargs=True)

    def notes(self, alike: str | None) -> tuple[Note, ...]:
        """What to say of the loss. Waits for the device.

        Args:
            alike: the remedy where examples are counted alike that have different numbers of labels; None: they aren't.
        """
        found = [COUPLED] if any(bool(one) for one in self._coupled) else []
        if alike is None:
            return tuple(found)
        ignored = [index for index, some in self._ignored if bool(some)]
        if ignored:
            return (*found, ragged(alike, ignored[0]))
        if any(bool(one) for one in self._unused):
            return (*found, masked(alike))
        return tuple(found)

    def remove(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
        self._outputs.clear()
        _look_no_more(self)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward pass is over: a backward pass may follow."""
        if not torch.is_grad_enabled() or transformed():
            return
        self._passes += 1
        if self._passes > _PASSES:
            self.remove()
            return
        given = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), None)
        if given is None or not len(given):
            return
        outputs = [x for x in leaves_in(output) if isinstance(x, Tensor) and x.grad_fn is not None]
        self._outputs.append((len(given), [(x, _hooks(x)) for x in outputs]))
        _look(self)

    def begins(self, loss: Tensor) -> None:
        """A backward pass begins at this loss."""
        if loss.numel() != 1 or loss.grad_fn is None or not self._outputs:
            return
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        outputs = [x for _, some in self._outputs for x, _ in some]
        nodes, met = _nodes(loss, {x.grad_fn for x in outputs if x.ndim}, {x.grad_fn for x in outputs})
        if not met:
            return  # of another model
        n = self._outputs[-1][0]
        by_example = [(x, hooks) for own, some in self._outputs for x, hooks in some if own == n]
        self._outputs.clear()
        if n > 2 and any(_pairs(node, n) for node in nodes):
            self._coupled.append(torch.ones((), dtype=torch.bool))
        self._ignored += [(index, _uneven(labels == index, n)) for index, labels in _labels(nodes)]
        parts = [(x, dim) for x, _ in by_example if (dim := _examples_in(x, n)) is not None]
        if parts and n > 1 and sum(x.numel() for x, _ in parts) <= _LARGEST:
            aside = self.aside()
            some = any(hooks for _, hooks in by_example) and aside is None
            if some or any(_hooks(x) != hooks or x.retains_grad for x, hooks in by_example):
                return  # hooks would see a pass more: another time
            with aside or contextlib.nullcontext(), torch.enable_grad():
                coupled, unused = _derived(loss, parts, n)
            self._coupled.append(coupled)
            self._unused += unused
        self._looks += 1
        if self._looks == _LOOKS:
            self.remove()


def _derived(loss: Tensor, parts: list[tuple[Tensor, int]], n: int) -> tuple[Tensor, list[Tensor]]:
    """Whether the loss's gradient at one example's outputs depends on another's, and whether it is unevenly 0.

    By second derivatives: of the squared gradient of some examples, by their own outputs and by the others'. Of a sum
    over examples the latter are exactly 0. Bools, 0-d.
    """
    first = torch.autograd.grad(loss, [x for x, _ in parts], create_graph=True, allow_unused=True)
    met = [(x, g, dim) for (x, dim), g in zip(parts, first, strict=True) if g is not None]
    unused = [_uneven((g == 0.0).all(-1), n) for _, g, dim in met if dim == 0 and (g.ndim == 3 or len(g) > n)]
    # Neither every other one nor a half: pairs of examples are laid out in either way.
    some = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.5
    some[0], some[-1] = True, False
    weights = [_along(some.to(x.device), x, dim, n) for x, _, dim in met]
    curved = [
        (g * g.detach() * weight).sum() for (_, g, _), weight in zip(met, weights, strict=True) if g.requires_grad
    ]
    if not curved:
        return torch.zeros((), dtype=torch.bool), unused  # linear in the outputs
    second = torch.autograd.grad(curved, [x for x, _, _ in met], retain_graph=True, allow_unused=True)
    own = other = torch.zeros((), dtype=torch.float64, device=loss.device)
    for h, weight in zip(second, weights, strict=True):
        if h is not None:
            size = h.detach().abs().double()
            own, other = own + (size * weight).sum(), other + (size * ~weight).sum()
    return other > _APART * (own + other), unused


def _along(some: Tensor, x: Tensor, dim: int, n: int) -> Tensor:
    """Which examples, as a mask that an output can be multiplied with."""
    length = x.shape[dim]
    each = some.repeat_interleave(length // n)
    return each.reshape([length if i == dim else 1 for i in range(x.ndim)])


def _examples_in(x: Tensor, n: int) -> int | None:
    """The dimension along which an output has the examples; None: it is not known."""
    if x.ndim and x.is_floating_point():
        for dim in range(min(x.ndim, 2)):
            if x.shape[dim] == n:
                return dim
        if len(x) and len(x) % n == 0:
            return 0  # an example's tokens one after the other
    return None


def _uneven(left: Tensor, n: int) -> Tensor:
    """Whether more is left out of one example than of another, 0-d; of whom it is, may not be known."""
    if n > 1 and left.numel() % n == 0:
        each = left.reshape(n, -1).sum(1)
        return each.min() != each.max()
    return left.any()


def _nodes(loss: Tensor, ends: set[Any], outputs: set[Any]) -> tuple[list[Any], bool]:
    """Those of the graph between the loss and where the model's outputs end it; whether it leads to any output."""
    waiting, seen, met = deque([loss.grad_fn]), {loss.grad_fn: None}, loss.grad_fn in outputs
    while waiting and len(seen) < _NODES:
        for after, _ in waiting.popleft().next_functions:  # type: ignore[union-attr]
            met = met or after in outputs
            if after is not None and after not in seen and after not in ends:
                seen[after] = None  # in order
                waiting.append(after)
    return list(seen), met


def _labels(nodes: list[Any]) -> Iterator[tuple[int, Tensor]]:
    """(ignore index, labels) of each mean over labels."""
    for node in nodes:
        if node.name() in ("NllLossBackward0", "NllLoss2DBackward0") and node._saved_reduction == _MEAN:
            index = node._saved_ignore_index
            yield index - (1 << 64 if index >= 1 << 63 else 0), node._saved_target  # torch hands it on unsigned


def _pairs(node: Any, n: int) -> bool:
    """Whether it sets each example against every other, of which no gradient is wanted (keys without a gradient)."""
    made = [_by_pairs(data.shape, n) for data in node._input_metadata]
    given = [None if after is None else after._input_metadata[i].shape for after, i in node.next_functions]
    return any(made) and None in given and not any(shape is not None and _by_pairs(shape, n) for shape in given)


def _by_pairs(shape: Any, n: int) -> bool:
    return [size for size in shape if size != 1][:2] == [n, n]


def _hooks(x: Tensor) -> int:
    return len(x._backward_hooks or ())


def _look(loss: Loss) -> None:
    """Where backward passes begin: torch has no hook there, so its method is replaced as long as one is awaited."""
    global _plain, _placed
    if loss not in _looking:
        _looking.add(loss)
        weakref.finalize(loss, _put_back).atexit = False
    if not _placed:
        _placed, _plain, torch.Tensor.backward = True, torch.Tensor.backward, _backward  # type: ignore[method-assign]


def _look_no_more(loss: Loss) -> None:
    _looking.discard(loss)
    _put_back()


def _put_back() -> None:
    global _placed
    if not list(_looking) and torch.Tensor.backward is _backward:  # its length counts those that were just let go of
        torch.Tensor.backward, _placed = _plain, False  # type: ignore[method-assign]


def _backward(
    self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> Any:
    for loss in tuple(_looking) if gradient is None else ():
        try:
            loss.begins(self)
        except Exception:  # no second derivative, or no memory for it: the training itself goes on
            loss.remove()
    return _plain(self, gradient, retain_graph, create_graph, inputs)
