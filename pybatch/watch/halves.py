"""Noise from the two halves of a batch, each by a backward pass of its own through the training's graph.

For a training that offers nothing else: layers whose examples can't be told apart inside (recurrent ones, attention in
one function), one backward pass a step, an optimizer without moments. Where examples meet in the loss alone, the
gradient at the model's output is a sum over them; what comes of its first and of its second half is the two halves'
gradient, dropout and state included, and their sum is the gradient of the batch.

Layers that compute their pass anew (checkpointing) do so in these passes too, and a custom function's backward() is
called in them; hooks on tensors would be, which is refused.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook

from pybatch.base.errors import UsageError
from pybatch.noise.handle import Collector, combine, trainable
from pybatch.noise.hooked import Hooked
from pybatch.noise.hooks import after_forward
from pybatch.noise.norms import square
from pybatch.noise.outputs import leaves_in
from pybatch.noise.per_example.refusals import refuse_undefined
from pybatch.noise.sources.examples import EVERY
from pybatch.records import Note
from pybatch.watch.batching import Batching, examples_in
from pybatch.watch.parting import Parting, find_parting
from pybatch.watch.passes import autocasting, autocasts

_CHECKED = 3  # measured passes, of which the halves are compared with the gradient of the training's own
_WAITING = 4  # forward passes of a step whose graphs are kept for a backward pass
_MIXED = 3  # steps that could not be measured, after which none can
_ALIKE = 1e-3  # of a squared norm: bf16's rounding of a sum of two is below it
MISSING = "no pair of norms: no backward pass followed a measured forward pass of two or more examples"
AGAIN = Note(
    "noise.b_simple",
    "to part the model's output by examples its forward() was called at least four times more after the first step",
)
MEAN = Note(
    "noise.b_simple",
    "of the gradients of both halves of a batch: the loss was taken for a mean over the examples of a batch, none of "
    "which enters another's (no contrastive loss, no mean over tokens where their numbers differ)",
)


class HalvesNoise(Collector):
    """Pairs from the gradients of the halves of a batch, and of the batch, in one step of every so many.

    Args:
        model, optimizer: what is trained, by one forward and backward pass a step.
        batching: where the batch is in the model's arguments.
        scaler: the GradScaler in use.
        every: steps from one that is measured to the next.
        parting: where the examples are in the output; None: found out by passes after the first step.

    Raises:
        UsageError: the model has batch normalization, sharded parameters or backward hooks. Later on, in hooks: a
            tensor between the model's parameters and its output has a hook, or keeps its gradient.
    """

    looks = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batching: Batching,
        *,
        scaler: Any = None,
        every: int = EVERY,
        parting: Parting | None = None,
    ) -> None:
        refuse_undefined(model)
        _refuse_hooks(model)
        self._params = [param for _, param in trainable(model)]
        super().__init__(
            "halves", model, self._params[0].device, missing=MISSING, notes=(MEAN, AGAIN), every=every,
        )  # fmt: skip
        self._batching, self._scaler, self._every, self.parting = batching, scaler, every, parting
        self._steps = 0
        self._met: _Met | None = None
        self._awaited: deque[list[_Arrival]] = deque()  # at the outputs of the latest passes of this step
        self._came = 0  # of them
        self._mixed = 0  # steps in which several gradients came
        self._found: tuple[float, float, Tensor, Tensor] | None = None  # the row of this step
        self._inside = False  # a backward pass of our own
        self._checked = 0
        self._hooked = Hooked()
        self._hooked.start()
        self._removals = [
            self._hooked.stop,
            _after(model, self._leave),
            optimizer.register_step_post_hook(lambda *_: self._step()).remove,
        ]

    @property
    def watching(self) -> bool:
        """Whether the step under way is one of those that are measured."""
        return self._found is not None or self._met is not None

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward pass is over."""
        if not torch.is_grad_enabled() or not module.training or self._steps % self._every or self._came:
            return
        self._refuse_changed(frozen=True)
        n = examples_in((args, kwargs), self.parting.batching if self.parting is not None else self._batching)
        if n is None or n < 2:
            return
        if self.parting is None:
            self._met = _Met((args, kwargs), n, autocasts())
        self._awaited.append([])
        came = _Came()
        for leaf, value in enumerate(leaves_in(output)):
            if isinstance(value, Tensor) and value.requires_grad:
                # Of the output as it is now: what the script writes into it is after the model.
                self._awaited[-1].append(_Arrival(self, leaf, n, get_gradient_edge(value), came))
                value.register_hook(self._awaited[-1][-1])  # type: ignore[no-untyped-call]
        if len(self._awaited) > _WAITING:  # of most of them nobody asks a gradient
            for arrival in self._awaited.popleft():
                arrival.let_go()

    def arrived(self, leaf: int, n: int, edge: Any, gradient: Tensor) -> None:
        """A gradient has come to a leaf of the output."""
        if self._inside:
            return
        self._came += 1
        if self._met is not None:
            self._met.leaves.add(leaf)
        elif self._came == 1 and edge is not None and self.parting is not None and leaf == self.parting.leaf:
            self._halve(n, edge, gradient, self.parting)

    @torch.no_grad()
    def _halve(self, n: int, edge: Any, gradient: Tensor, parting: Parting) -> None:
        self._refuse_seen(edge.node)
        later = parting.second_half(gradient, n)
        self._inside = True
        try:
            first, second = (self._own(edge, gradient.masked_fill(mask, 0.0)) for mask in (later, ~later))
        finally:
            self._inside = False
        half = n // 2
        parts = torch.stack([self._square(first), self._square(second)])
        large = self._square(_added(first, second))
        if self._checked < _CHECKED and all(p.grad is None or not p.grad.any() for p in self._params):
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._compare(large))
        scale: Any = 1.0
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=self._device)).double() ** -2
        # Each part is its half's mean gradient times its share of the examples: `combine` takes it times two.
        squares = 4.0 * scale * (parts[0] / half + parts[1] / (n - half))
        small, n_small, n_large = combine(True, 2, squares, float(n))
        self._found = (n_small, n_large, small.reshape(1), (large * scale).reshape(1))

    def _refuse_seen(self, node: Any) -> None:
        """The script would see two gradients more, or their sum in `.grad`."""
        _refuse_hooks(self._model)
        called = self._hooked.below(node)
        if called is not None:
            raise UsageError(
                f"halves of a batch: {called}() was called of a tensor between the model's parameters and its output, "
                "and would see more gradients"
            )

    def _own(self, edge: Any, gradient: Tensor) -> list[Tensor | None]:
        """What this gradient at the output gives for each parameter, out of a graph that stands afterwards."""
        found = torch.autograd.grad([edge], self._params, [gradient], retain_graph=True, allow_unused=True)
        return [one.to_dense() if one is not None and one.is_sparse else one for one in found]

    def _square(self, gradients: Any) -> Tensor:
        parts = [square(one, self._scaled) for one in gradients if one is not None]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def _compare(self, large: Tensor) -> None:
        """The backward pass is over: both halves have to make up its gradient."""
        own = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None]
        if self._came > 1:
            return
        self._checked += 1
        expected, found = float(self._square(own)), float(large)
        if expected == expected and abs(found - expected) > _ALIKE * expected + 1e-30:  # not where it overflowed
            self._found = None
            raise UsageError(
                "halves of a batch: their gradients do not add up to the step's own. Some of the loss does not come "
                "from the model's output (a penalty on weights, say) or comes from another output that this one is "
                "made of, or a hook changes gradients"
            )

    def _step(self) -> None:
        """A step is over."""
        came, self._came = self._came, 0
        for arrival in itertools.chain.from_iterable(self._awaited):
            arrival.forget()
        self._awaited.clear()
        self._hooked.clear()
        if came > 1:
            self._found = None
            self._mixed += 1
        self._settle()
        met, self._met = self._met, None
        self._steps += 1
        if self._mixed >= _MIXED:
            raise UsageError("halves of a batch: gradients come to several outputs, or passes, of the model in a step")
        if met is not None and len(met.leaves) == 1 and self.parting is None:
            self._steps = 0  # the next step is measured
            batching = replace(self._batching, size=met.examples)
            with autocasting(met.autocast):
                self.parting = find_parting(self._model, met.arguments, batching, next(iter(met.leaves)))

    def _settle(self) -> None:
        if self._found is not None:
            found, self._found = self._found, None
            self._row(*found)

    def _said(self) -> tuple[Note, ...]:
        if self._every == 1:
            return self._notes
        return (*self._notes, Note("noise.steps", f"one step in {self._every} is measured"))


def _after(model: nn.Module, call: Callable[[nn.Module, Any, Any, Any], None]) -> Callable[[], None]:
    """Call it after each forward pass of this model; one of torch.jit takes no hooks but the global ones.

    Those are asked for no keyword arguments: torch would never forget that it gave them (2.13), and then warn, at each
    call of a compiled module, of a hook that is gone.
    """
    if not isinstance(model, torch.jit.ScriptModule):
        return after_forward(model, call, with_kwargs=True).remove

    def own(module: nn.Module, args: Any, output: Any) -> None:
        if module is model:
            call(module, args, {}, output)

    return register_module_forward_hook(own).remove


@dataclass
class _Met:
    """A pass that is looked at before any is measured."""

    arguments: Any
    examples: int
    autocast: dict[str, torch.dtype]
    leaves: set[int] = field(default_factory=set)  # of the output, to which gradients came


class _Arrival:
    """A hook at an output, with what is needed there. It holds the graph that holds it, until one of both lets go.

    Args:
        noise, leaf, n, edge: what to tell, and whom.
        came: the gradients of this pass.
    """

    def __init__(self, noise: HalvesNoise, leaf: int, n: int, edge: Any, came: _Came) -> None:
        self._given: tuple[HalvesNoise, int, int, Any] | None = noise, leaf, n, edge
        self._came: _Came | None = came

    def let_go(self) -> None:
        """Of the graph; that a gradient came is still told."""
        if self._given is not None:
            self._given = (*self._given[:3], None)

    def forget(self) -> None:
        """It will not come any more."""
        self._given = self._came = None

    def __call__(self, gradient: Tensor | None) -> None:
        if self._given is None or self._came is None or gradient is None:  # None: not of this tensor of a chunk()
            return
        noise, leaf, n, edge = self._given
        if not self._came.through(leaf, edge):
            noise.arrived(leaf, n, edge, gradient)


class _Came:
    """The gradients at the outputs of one forward pass."""

    def __init__(self) -> None:
        self._leaves: set[int] = set()
        self._edges: list[Any] = []  # of these, those from which the graph was not walked yet
        self._walked: set[Any] = set()  # nodes
        self._reached: set[tuple[Any, int]] = set()  # where gradients go from there: nodes, and which output of theirs

    def through(self, leaf: int, edge: Any) -> bool:
        """Whether what comes here has come through another output, which is made of this one.

        Of a pass that was let go the graph is not there to tell: it has one output, as it can't be measured anyway.
        """
        if leaf in self._leaves:  # in a further backward pass
            return False
        if edge is None:
            if self._leaves:
                return True
        else:
            self._walk()
            if (edge.node, edge.output_nr) in self._reached:
                return True
            self._edges.append(edge)
        self._leaves.add(leaf)
        return False

    def _walk(self) -> None:
        """Each node is met once in a pass, however many outputs there are, and none where but one has a gradient."""
        waiting = [edge.node for edge in self._edges]
        self._edges = []
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self._walked:
                self._walked.add(node)
                self._reached.update(node.next_functions)
                waiting += [after for after, _ in node.next_functions]


def _added(first: list[Tensor | None], second: list[Tensor | None]) -> Iterator[Tensor | None]:
    """Their sums, one at a time, in fp32 or better."""
    for one, two in zip(first, second, strict=True):
        if one is None or two is None:
            yield one if two is None else two
        else:
            yield one.add(two) if one.dtype in (torch.float32, torch.float64) else one.float().add(two.float())


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks of the script's own on gradients would see two backward passes more."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise UsageError(f"halves of a batch: module {name or 'model'!r} has backward hooks, which would see more")
    for name, param in model.named_parameters():
        if param._backward_hooks:
            raise UsageError(f"halves of a batch: parameter {name!r} has a hook, which would see more gradients")
