"""What a script trains, by torch's global hooks: the models that are called, the optimizers that step."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from pybatch.noise.outputs import leaves_in
from pybatch.watch.batching import BatchSecond
from pybatch.watch.by_hand import BACKWARDS, ByHand


@dataclass(eq=False)
class Trained:
    """An optimizer that steps, and the models whose forward passes led to it."""

    optimizer: torch.optim.Optimizer
    steps: int = 0
    models: dict[nn.Module, int] = field(default_factory=dict)  # outermost ones with its parameters, and their passes
    passes: int = 0  # of the model in the step before

    @property
    def parameters(self) -> int:
        """How many numbers it updates; of sharded ones all."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    @property
    def model(self) -> nn.Module | None:
        """The one with most of its parameters; None where none was called."""
        return max(self.models, key=lambda model: _shared(model, self.optimizer), default=None)

    @property
    def others(self) -> list[nn.Module]:
        """Further models that the step calls by themselves."""
        return [model for model in self.models if model is not self.model]


def _shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sum(p.numel() for p in model.parameters() if id(p) in own)


class Finder:
    """Looks at every module's forward pass until the training is known; they cost a little in each.

    Compiled code is not looked into: there the hooks do nothing, so that they are compiled away.

    Args:
        by_hand: called with a model that had backward passes, but no optimizer's step.
    """

    def __init__(self, by_hand: Callable[[nn.Module], None]) -> None:
        self._by_hand = by_hand
        self._backwards: Counter[nn.Module] = Counter()
        self.second = BatchSecond()
        self.trained: list[Trained] = []  # in the order of their first steps
        self._depth = 0
        self._called: list[nn.Module] = []  # outermost modules called with gradients since the last step of any
        self._removals: list[Callable[[], None]] = []

    def start(self) -> None:
        """Put the hooks on."""
        self._depth, self._called = 0, []  # they may have been taken off within a forward pass
        # torch.compile warns of global hooks, which here do nothing in compiled code.
        before = list(warnings.filters)
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        ours = [one for one in warnings.filters if one not in before]
        self._removals = [
            register_module_forward_pre_hook(self._enter).remove,
            register_module_forward_hook(self._leave, always_call=True).remove,
            lambda: [warnings.filters.remove(one) for one in ours if one in warnings.filters],  # type: ignore
        ]

    def stop(self) -> None:
        """Take them off."""
        for remove in self._removals:
            remove()
        self._removals = []

    def stepped(self, optimizer: torch.optim.Optimizer) -> Trained:
        """An optimizer has stepped: the models called since the last step that hold its parameters are its own."""
        found = next((t for t in self.trained if t.optimizer is optimizer), None)
        if found is None:
            found = Trained(optimizer)
            self.trained.append(found)
        found.steps += 1
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        calls: dict[nn.Module, int] = {}
        for module in self._called:
            if module in calls or any(id(p) in own for p in module.parameters()):
                calls[module] = calls.get(module, 0) + 1
        for module, times in calls.items():
            found.models[module] = found.models.get(module, 0) + times
        if found.model is not None:
            found.passes = calls.get(found.model, 0)
        self._called = []
        return found

    def chosen(self, index: int | None) -> Trained | None:
        """The optimizer of this index by first step, None until it has stepped; no index: that with most parameters."""
        if index is not None:
            counted = self.real or self.trained
            return counted[index] if index < len(counted) else None
        return max(self.trained, key=lambda t: t.parameters)

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """It is none after all."""
        self.trained = [one for one in self.trained if one.optimizer is not optimizer]

    @property
    def real(self) -> list[Trained]:
        """Those that are no updates by hand."""
        return [one for one in self.trained if not isinstance(one.optimizer, ByHand)]

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._removals)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth == 1 and torch.is_grad_enabled():
            self._called.append(module)
        self.second.see(module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth or self.trained or not torch.is_grad_enabled():
            return
        first = next((v for v in leaves_in(output) if isinstance(v, Tensor) and v.requires_grad), None)
        if first is not None and any(p.requires_grad for p in module.parameters()):
            first.register_hook(lambda gradient: self._passed(module))  # type: ignore[no-untyped-call]

    def _passed(self, module: nn.Module) -> None:
        """A gradient has come to the output of an outermost module, while no optimizer has stepped yet."""
        self._backwards[module] += 1
        if self._backwards[module] == BACKWARDS and not self.trained:
            self._by_hand(module)


def scaler_of() -> Any:
    """The GradScaler in whose step() this is called; None where it is in none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(own, torch.amp.GradScaler):
            return own if own.is_enabled() else None
        frame = frame.f_back
    return None


def kinds_of(model: nn.Module) -> list[str]:
    """What the model is wrapped in, in words."""
    from torch.distributed.fsdp import FSDPModule

    found = []
    if isinstance(model, DistributedDataParallel):
        found.append("DDP")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        found.append("FSDP2")
    if compiled(model):
        found.append("torch.compile")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        found.append("torch.jit")
    return found


def compiled(model: nn.Module) -> bool:
    """Whether some of it is compiled by torch.compile."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def plain_name(model: nn.Module) -> str:
    """The class of what is trained, without its wrappers; that of FSDP2 is a class made on the spot."""
    inner: Any = model
    while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return type(inner).__name__.removeprefix("FSDP")
