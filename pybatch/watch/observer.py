"""The training of this process under observation: what it is, its steps, its noise and its newest pass.

Nothing here changes what the script computes, and nothing that fails here reaches it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pybatch.noise.hooks import after_forward, before_forward
from pybatch.noise.outputs import leaves_in
from pybatch.noise.sources.micro_batches import mark
from pybatch.optim import FusedOptimizer
from pybatch.watch.batching import Batching, examples_in, find_batching
from pybatch.watch.by_hand import ByHand
from pybatch.watch.clipping import Left
from pybatch.watch.finding import Finder, Trained, compiled, kinds_of, scaler_of
from pybatch.watch.loader import LoaderWatch
from pybatch.watch.marks import marks_for
from pybatch.watch.noise import NoiseWatch
from pybatch.watch.passes import Pass
from pybatch.watch.steps import Steps
from pybatch.watch.together import together

_KEEP_EVERY = 50  # passes from one that is kept to the next
_CLIPPING = 3  # steps of the training in which it is looked whether gradients are clipped
_SETTLED = 2  # steps of an optimizer, after which all that take part have stepped as a rule


@dataclass(eq=False)
class Subject:
    """What is trained, as far as it was found."""

    trained: Trained
    model: nn.Module | None
    device: torch.device
    scaler: Any = None
    clipped: bool = False
    world: int = 1  # processes that train together
    closures: bool = False  # a step that evaluates the model more than once
    rate: float = 0.0  # the largest learning rate of its steps
    marks: tuple[str, ...] = ()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trained.optimizer


@dataclass(eq=False)
class _Through:
    """Backward passes through one forward pass."""

    task: int = -1  # autograd's number of the newest
    passes: int = 0  # that are over
    parts: int = 0  # of them, that gave a part of the step's gradient
    ahead: bool = False  # whether the first gave none


def harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of the observer that does nothing in a forked child, and ends the observation where it fails."""

    @functools.wraps(hook)
    def call(self: Observer, *args: Any) -> None:  # every step comes here some six times
        if torch.compiler.is_compiling() or self.fault is not None or os.getpid() != self._pid:
            return
        try:
            hook(self, *args)
        except Exception as error:
            self.fault = error

    return call


class Observer:
    """Watches from `start` to `stop`; in a forked child it does nothing.

    Args:
        index: of the optimizer by first step; None: that with most parameters.
        found: called when the training is known, or turns out to be another.
        stepped: called after every step of it, last of all: it may raise to end the script.
        steps: after which it will; None: not known.
    """

    def __init__(
        self,
        index: int | None,
        found: Callable[[Subject], None],
        stepped: Callable[[], None],
        steps: int | None = None,
    ) -> None:
        self._index, self._found, self._stepped, self._most = index, found, stepped, steps
        self._finder = Finder(self._adopt)
        self._pid = os.getpid()
        self.fault: Exception | None = None  # of pybatch's own, which ended the observation
        self._removals: list[Callable[[], None]] = []
        self._own: list[Callable[[], None]] = []  # hooks on the model
        self._loader: LoaderWatch | None = None
        self.subject: Subject | None = None
        self.hand: ByHand | None = None  # in place of the optimizer that a script has not
        self.steps: Steps | None = None
        self.noise: NoiseWatch | None = None
        self.kept: Pass | None = None  # the newest whole pass of the usual size
        self.batching: Batching | None = None
        self.autocast: dict[str, torch.dtype] = {}
        self._pass: Pass | None = None
        self._passes = self._over = 0  # backward passes begun, and those of them that are over
        self._pending = 0  # examples of the forward pass under way
        self._in_pass = self._in_step = self._done = False
        self._evaluations = 0  # backward passes within the optimizer's step
        self._first: Tensor | None = None  # a parameter that is trained
        self._left: Left | None = None
        self._looked_until = 0  # steps, up to which it is looked whether gradients are clipped

    def start(self) -> None:
        """Put the hooks on."""
        self._finder.start()
        self._removals = [
            register_optimizer_step_pre_hook(self._begin).remove,
            register_optimizer_step_post_hook(self._end).remove,
        ]
        self._loader = LoaderWatch(self._waited)
        self._removals.append(self._loader.remove)

    def stop(self) -> None:
        """Take all hooks off; what was found stays readable."""
        for remove in (*self._removals, *self._own):
            remove()
        self._removals, self._own = [], []
        self._finder.stop()
        if self.noise is not None:
            self.noise.detach()
        if self.steps is not None:
            self.steps.settle()

    @property
    def workers(self) -> int | None:
        """Of the script's DataLoader; None where it uses none."""
        return self._loader.workers if self._loader is not None else None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All that have stepped, in the order of their first steps; updates by hand where there are no others."""
        return [trained.optimizer for trained in self._finder.real or self._finder.trained]

    # Steps.

    @harmless
    def _begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.subject is None or self.steps is None or optimizer is not self.subject.optimizer:
            return
        self._in_step, self._evaluations = True, 0
        rate = optimizer.param_groups[0].get("lr")
        if isinstance(rate, int | float) and rate > self.subject.rate:
            self.subject.rate = float(rate)
        if self._left is not None:
            self.subject.clipped = self._left.clipped(self.subject.scaler)
            self._left = None
        if self.noise is not None and self.noise.stepping(self.steps.examples):
            self.steps.unusual()
        self.steps.updating()

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._ended(optimizer)
        if self._done:
            self._done = False
            self._stepped()  # last of all, as it may end the script

    @harmless
    def _ended(self, optimizer: torch.optim.Optimizer) -> None:
        if self.hand is not None and optimizer is not self.hand and self.hand.holds(optimizer):
            self._give_up_hand(self.hand)
        subject, steps = self.subject, self.steps
        own = subject is not None and optimizer is subject.trained.optimizer
        if self._finder.active or (not own and self._unseen(optimizer)):
            self._look(optimizer)
        if subject is None or steps is None or not own or self.subject is not subject:
            return
        subject.closures |= self._evaluations > 1
        self._in_step = False
        steps.updated()
        if self.noise is not None:
            self.noise.stepped()
        self._done = True

    @harmless
    def _adopt(self, model: nn.Module) -> None:
        """Backward passes without an optimizer's step: the script updates its parameters itself."""
        if self.hand is None:
            self.hand = ByHand(model)
            self._removals.append(self.hand.remove)

    def _give_up_hand(self, hand: ByHand) -> None:
        """An optimizer steps after all: the many backward passes before were one step's."""
        hand.remove()
        self.hand = None
        self._finder.forget(hand)
        if self.subject is None or self.subject.optimizer is not hand:
            return
        for remove in self._own:
            remove()
        if self.noise is not None:
            self.noise.detach()
        self._own, self.subject, self.steps, self.noise = [], None, None, None
        self.kept = self._pass = None
        self._in_pass = False
        if not self._finder.active:
            self._finder.start()

    def _unseen(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this one came late, and is to be told apart from those that came first."""
        known = [trained.optimizer for trained in self._finder.trained]
        return all(optimizer is not one for one in known)

    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        """A step while it is not known, or no longer, what is trained."""
        self._finder.stepped(optimizer)
        chosen = self._finder.chosen(self._index)
        if chosen is None:
            return
        if self.subject is not None and chosen.optimizer is self.subject.optimizer:
            self._finder.stop()
        elif chosen.steps >= _SETTLED:
            self._settle(chosen)
        elif not self._finder.active:  # a larger one that came late
            self._finder.start()

    def _settle(self, trained: Trained) -> None:
        self._finder.stop()
        for remove in self._own:
            remove()
        if self.noise is not None:
            self.noise.detach()
        params = [p for group in trained.optimizer.param_groups for p in group["params"]]
        first = self._first = next((p for p in params if p.grad is not None), params[0])
        model = trained.model
        marks = tuple(kinds_of(model)) if model is not None else ()
        scaler = scaler_of()
        several = together(first.device)
        world = several.world if several is not None else 1
        subject = Subject(trained, model, first.device, scaler, marks=marks, world=world)
        self.subject, self.steps, self.noise = subject, Steps(marks_for(first.device)), None
        self.steps.count = trained.steps
        self._looked_until = trained.steps + _CLIPPING
        self._own = []
        if model is not None:
            self._own = self._hooks(model)
            self.noise = NoiseWatch(
                subject.model, trained.optimizer, trained.passes, scaler, compiled(model), self._most
            )
        self._found(subject)
        self.steps.updated()
        self.steps.count -= 1

    def _hooks(self, model: nn.Module) -> list[Callable[[], None]]:
        """Watch the passes of this model; one of torch.jit takes no hooks but the global ones."""
        if not isinstance(model, torch.jit.ScriptModule):
            return [
                before_forward(model, self._enter, with_kwargs=True).remove,
                after_forward(model, self._leave).remove,
            ]

        def enter(module: nn.Module, args: Any) -> None:
            if module is model:
                self._enter(module, args, {})

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module is model:
                self._leave(module, args, output)

        return [register_module_forward_pre_hook(enter).remove, register_module_forward_hook(leave).remove]

    # Passes.

    @harmless
    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.steps is None:
            return
        if not torch.is_grad_enabled() or (self.kept is not None and module.training != self.kept.training):
            self.steps.unusual()  # an evaluation
            self._in_pass = False
            return
        arguments = (args, kwargs)
        examples = examples_in(arguments, self.batching)
        if examples is None:
            self.batching = find_batching(arguments, self._finder.second.sizes)
            examples = examples_in(arguments, self.batching)
        if self.noise is not None and not self.noise.begun:
            self.noise.begin(self.batching, module, args, kwargs)
        self._pending = examples or 0
        self._pass = None
        if self.batching is not None and (self.kept is None or self._passes % _KEEP_EVERY == 0):
            usual = self.steps.micro_batch
            if usual is None or usual == self._pending:
                self._pass = Pass.begun(module, arguments, find_batching(arguments, self._finder.second.sizes))  # type: ignore[arg-type]
                self.autocast = self._pass.autocast
        self._in_pass = True
        self.steps.forward()

    @harmless
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._in_pass:
            return
        self._in_pass = False
        leaves = leaves_in(output)
        kept, examples, begun = self._pass, self._pending, 0

        through = _Through()

        def arrived(leaf: int, gradient: Tensor | None) -> None:
            nonlocal begun
            if gradient is None:  # of one tensor of a chunk() only the others are used
                return
            if kept is not None and leaf not in kept.gradients:
                kept.keep(leaf, gradient)
            if not begun:
                begun = self._passes + 1
                self._backward(kept, examples)
                self._look_at(through)
            elif self._over >= begun:  # in a further backward pass
                self._look_at(through)

        found = False
        for leaf, value in enumerate(leaves):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient, leaf=leaf: arrived(leaf, gradient))  # type: ignore[no-untyped-call]
                found = True
                if kept is None and isinstance(output, Tensor):
                    break
        if kept is not None:
            kept.outputs = len(leaves)
        if not found and self.steps is not None:
            self.steps.unusual()

    @harmless
    def _backward(self, kept: Pass | None, examples: int) -> None:
        if self.steps is None:
            return
        self._passes += 1
        self._evaluations += self._in_step
        self.steps.backward(examples, self._cleared())
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._passed(kept))

    @harmless
    def _look_at(self, through: _Through) -> None:
        """A backward pass goes through a forward pass: does it give a part of the step's gradient?

        Not one of `torch.autograd.grad`, for a penalty on gradients say. One that ends the graph is not looked at, as
        none can follow it.
        """
        task = torch._C._current_graph_task_id()
        if task == through.task:
            return
        through.task = task
        if not through.passes and not torch._C._autograd._get_current_graph_task_keep_graph():
            through.passes = through.parts = 1
            return
        before = self._marks()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._looked_at(through, before))

    @harmless
    def _looked_at(self, through: _Through, before: list[Any] | None) -> None:
        gave = before is None or before != self._marks()
        through.passes += 1
        through.parts += gave
        through.ahead |= through.passes == 1 and not gave
        if self.noise is not None and through.passes > 1:
            self.noise.repeated(through.parts, through.ahead)

    def _marks(self) -> list[Any] | None:
        """What changes where a backward pass adds to the gradient of what is trained; None where that isn't seen."""
        subject = self.subject
        if subject is None or subject.world > 1:  # FSDP2 writes gradients later
            return None
        params = [p for group in subject.optimizer.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            return None
        return [mark(p) for p in params]

    def _cleared(self) -> bool:
        """Whether the gradients of the passes before are gone; `accumulate` of pybatch's optimizers moves them away."""
        optimizer = self.subject.optimizer if self.subject is not None else None
        if isinstance(optimizer, FusedOptimizer) and optimizer._sums.under_way:
            return False
        return self._first is None or self._first.grad is None

    @harmless
    def _passed(self, kept: Pass | None) -> None:
        """The backward pass is over."""
        self._over = self._passes
        if self.steps is None or self.subject is None:
            return
        self.steps.passed()
        if kept is not None and kept.complete:
            self.kept, self._pass = kept, None
        # At every pass of a step, as the next one adds to the same gradients. DDP writes gradients after this.
        if self.steps.count < self._looked_until and self.subject.world == 1:
            params = [p for group in self.subject.optimizer.param_groups for p in group["params"]]
            self._left = Left([p for p in params if p.grad is not None])

    @harmless
    def _waited(self, seconds: float) -> None:
        if self.steps is not None:
            self.steps.loaded(seconds)
