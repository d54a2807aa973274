"""What a training's own loss makes of a batch: whether examples meet in it, and labels it leaves out.

A noise scale takes the loss for a mean over examples, each of which counts by itself. The model does not tell: the loss
is computed outside of it. So the first backward passes are looked at where they begin: the loss is known then, and its
graph, which leads down to the model's outputs. Nothing of the training may change by it: where hooks or functions of
its own would see a pass more, there is no look.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from pybatch.noise.hooked import Hooked
from pybatch.noise.hooks import after_forward, transformed
from pybatch.noise.labels import ragged
from pybatch.noise.outputs import leaves_in
from pybatch.records import Note

COUPLED = Note(
    "noise.loss",
    "the loss couples the examples of a batch (as contrastive losses and in-batch negatives do): its gradient is not "
    "the mean of theirs, so the scale holds for micro-batches of this size alone, and predicts no critical batch",
)
_LOOKS = 2  # backward passes looked at
_PASSES = 8  # forward passes, after which a training is no more looked at whose backward passes can't be seen
_WAITING = 4  # of them whose outputs are kept for one backward pass
_LARGEST = 1 << 22  # numbers in outputs and loss, above which second derivatives would take memory that may be missed
_LEAST = 4  # examples: of fewer a pair or a triplet can't be told from a batch
_APART = 0.01  # of all second derivatives of an example's gradient, those by the others
_NODES = 1000  # of a loss's graph that are looked at
_MEAN = 1  # torch's number for reduction="mean"

_lock = threading.Lock()
_looking: weakref.WeakSet[Loss] = weakref.WeakSet()
_plain: Any = torch.Tensor.backward  # what stood where ours stands
_placed = False  # whether ours stands there, or under what others have put over it


class Loss:
    """Looks at the first backward passes of a model's training.

    Nothing waits for the device until `notes` is called, and no gradient of a parameter is computed.

    Args:
        model: whose outputs the loss is made of.
        examples: of a forward pass, as the user gives them; None: dimension 0 of its first input; 0: not known.
    """

    def __init__(self, model: nn.Module, examples: Callable[[], int | None] = lambda: None) -> None:
        self._examples = examples
        self.aside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # in it our own hooks rest
        self._model = weakref.ref(model)
        self._looks = self._passes = 0
        self._outputs: deque[tuple[int, list[Tensor]]] = deque(maxlen=_WAITING)  # examples and outputs of each pass
        self._handles = 0  # of hooks of anybody's, up to the last of these passes: some are on nodes of the graph
        self._hooked = Hooked()
        self._hooked.start()
        self._coupled: list[Tensor] = []
        self._ignored: list[tuple[int, Tensor]] = []  # ignore index, whether labels hold it unevenly
        # TorchScript's modules take no hook at the end of a pass.
        scripted = isinstance(model, torch.jit.ScriptModule)
        self._hook = None if scripted else after_forward(model, self._forward, with_kwargs=True)

    def notes(self, alike: str | None) -> tuple[Note, ...]:
        """What to say of the loss. Waits for the device.

        Args:
            alike: the remedy where examples are counted alike that have different numbers of labels; None: they aren't.
        """
        found = [COUPLED] if any(bool(one) for one in self._coupled) else []
        ignored = [index for index, some in self._ignored if bool(some)]
        return (*found, *((ragged(alike, ignored[0]),) if ignored and alike is not None else ()))

    def remove(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hooked.stop()
        self._outputs.clear()
        _look_no_more(self)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward pass is over: a backward pass may follow."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformed():
            return
        self._passes += 1
        try:
            if self._passes <= _PASSES:
                self._keep(args, kwargs, output)
            else:
                self.remove()
        except Exception:  # outputs of a kind that is not known here
            self.remove()

    def _keep(self, args: Any, kwargs: Any, output: Any) -> None:
        n = self._examples()
        if n is None:
            given = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), None)
            n = 0 if given is None else len(given)
        outputs = [x for x in leaves_in(output) if isinstance(x, Tensor) and x.grad_fn is not None]
        if n and sum(x.numel() for x in outputs) <= _LARGEST:
            self._outputs.append((n, outputs))
            self._handles = RemovableHandle.next_id
            _look(self)

    def begins(self, loss: Tensor) -> None:
        """A backward pass begins at this loss."""
        if loss.numel() != 1 or loss.grad_fn is None or not self._outputs or torch.is_anomaly_enabled():
            return
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        outputs = [x for _, some in self._outputs for x in some]
        nodes, met = _nodes(loss, {x.grad_fn for x in outputs if x.ndim}, {x.grad_fn for x in outputs})
        if not met:
            return  # of another model
        n = self._outputs[-1][0]
        alike = [x for own, some in self._outputs for x in some if own == n]
        self._outputs.clear()
        hooked = self._hooked.below(loss.grad_fn) is not None or self._handles != RemovableHandle.next_id
        self._hooked.clear()
        self._ignored += [(index, _uneven(labels == index, n)) for index, labels in _labels(nodes)]
        parts = [(x, dim) for x in alike if (dim := _examples_in(x, n)) is not None]
        if parts and n >= _LEAST and _plain_torch(nodes):
            model = self._model()
            if hooked or (
                model is not None and any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
            ):
                return  # somebody would be told of a pass more: another time
            if any(_of_outputs(node, parts, n) for node in nodes):
                self._coupled.append(torch.ones((), dtype=torch.bool))
            else:
                with self.aside(), torch.enable_grad():
                    self._coupled += _coupled(loss, parts, n)
        self._looks += 1
        if self._looks == _LOOKS:
            self.remove()


def _coupled(loss: Tensor, parts: list[tuple[Tensor, int]], n: int) -> list[Tensor]:
    """For two examples, whether the gradient of the loss at their outputs depends on half of the others' or more.

    By second derivatives, which are exactly 0 for a sum over examples. Those of a pair or a triplet of rows, whose
    losses are added, are of few others. Bools, 0-d.
    """
    first = torch.autograd.grad(loss, [x for x, _ in parts], create_graph=True, allow_unused=True)
    met = [(x, g, dim) for (x, dim), g in zip(parts, first, strict=True) if g is not None]
    found = []
    for place in (0, n // 2):
        curved = []
        for g, dim in ((g, dim) for _, g, dim in met if g.requires_grad):
            own = _rows(g, dim, n)[place]
            # The direction counts, not the size, which in fp16 overflows.
            curved.append((own * (own.detach() / own.detach().abs().max().clamp(min=1e-30))).sum())
        if not curved:
            continue  # linear in the outputs
        second = torch.autograd.grad(curved, [x for x, _, _ in met], retain_graph=True, allow_unused=True)
        bent = [(h, dim) for h, (_, _, dim) in zip(second, met, strict=True) if h is not None]
        sizes = [_rows(h.detach(), dim, n).abs().double().sum(1) for h, dim in bent]
        if sizes:
            each = torch.stack(sizes).sum(0)
            others = each.sum() - each[place]
            many = (each > 0.0).sum() - 1 >= n / 2
            found.append(many & (others > _APART * each.sum()))
    return found


def _rows(x: Tensor, dim: int, n: int) -> Tensor:
    """[n, numbers of an example]."""
    return x.movedim(dim, 0).reshape(n, -1)


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
        by_row, by_column = left.reshape(n, -1).sum(1), left.reshape(-1, n).sum(0)  # batch or time first
        return (by_row.min() != by_row.max()) & (by_column.min() != by_column.max())
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


def _plain_torch(nodes: list[Any]) -> bool:
    """Whether the graph is torch's own, whole and small: a function of others may count its passes, work in place or
    wait for other processes."""
    if len(nodes) >= _NODES or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    numbers = sum(math.prod(data.shape) for node in nodes for data in node._input_metadata)
    return numbers <= _LARGEST and not any(isinstance(node, BackwardCFunction) for node in nodes)


def _labels(nodes: list[Any]) -> Iterator[tuple[int, Tensor]]:
    """(ignore index, labels) of each mean over labels."""
    for node in nodes:
        if node.name() in ("NllLossBackward0", "NllLoss2DBackward0") and node._saved_reduction == _MEAN:
            index = node._saved_ignore_index
            yield index - (1 << 64 if index >= 1 << 63 else 0), node._saved_target  # torch hands it on unsigned


def _of_outputs(node: Any, parts: list[tuple[Tensor, int]], n: int) -> bool:
    """Whether it multiplies each example's output with every one's without a gradient (z @ z.detach().T)."""
    if node.name() != "MmBackward0" or [tuple(data.shape) for data in node._input_metadata] != [(n, n)]:
        return False
    held = {x.untyped_storage().data_ptr() for x, _ in parts}
    factors = (getattr(node, name) for name in ("_saved_self", "_saved_mat2"))
    return any(x is not None and not x.requires_grad and x.untyped_storage().data_ptr() in held for x in factors)


def _look(loss: Loss) -> None:
    """Where backward passes begin: torch has no hook there, so its method is replaced as long as one is awaited."""
    global _plain, _placed
    with _lock:
        if loss not in _looking:
            _looking.add(loss)
            weakref.finalize(loss, _put_back).atexit = False
        if not _placed:
            _placed, _plain, torch.Tensor.backward = True, torch.Tensor.backward, _backward  # type: ignore[method-assign]


def _look_no_more(loss: Loss) -> None:
    with _lock:
        _looking.discard(loss)
    _put_back()


def _put_back() -> None:
    global _placed
    if not list(_looking) and torch.Tensor.backward is _backward:  # its length counts those that were just let go of
        torch.Tensor.backward, _placed = _plain, False  # type: ignore[method-assign]


def _backward(
    self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> Any:
    with _lock:
        awaited = list(_looking) if gradient is None else []
    for loss in awaited:
        try:
            loss.begins(self)
        except Exception:  # no second derivative, or no memory for it: the training itself goes on
            loss.remove()
    return _plain(self, gradient, retain_graph, create_graph, inputs)
