"""All that steps of a training change, kept and put back to the bit."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pybatch.optim import FusedOptimizer
from pybatch.watch.contents import Contents

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@contextmanager
def put_back(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], apart: Iterable[Any] = ()
) -> Iterator[None]:
    """In here steps may be made; afterwards all is as it was, and every tensor the same object.

    Parameters, gradients, buffers and other attributes of modules, with the tensors, containers, arrays and objects
    inside of them to a depth of 8, hooks and what is `apart` left out; states and groups of the optimizers likewise;
    and the random generators of torch, NumPy, Python and of the modules. Rates are 0 in here, so that repeated steps
    over one batch lead nowhere, and hooks of the optimizers' own do not run.
    """
    kept: list[_Kept] = [_Model(model, apart), *(_Optimizer(optimizer) for optimizer in optimizers), _Random(model)]
    try:
        yield
    finally:
        for one in reversed(kept):
            one.restore()


class _Kept(Protocol):
    def restore(self) -> None: ...


class _Values:
    """Tensors, each the same object, with copies of what they held."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        unique = {id(t): t for t in tensors}
        self._pairs = [(t, _copied(t)) for t in unique.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, held in self._pairs:
            if not _same(tensor, held):  # a step that changed nothing leaves no trace, such as a higher version
                # inference_mode(False) would turn gradients on, and a leaf that has one takes no copy then.
                with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                    _unexpanded(tensor).copy_(_unexpanded(held, tensor))


def _copied(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()


def _same(tensor: Tensor, held: Tensor) -> bool:
    """Whether it holds the same on the host, where looking is cheap; a GPU's are written anew."""
    if tensor.device.type != "cpu" or type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    return torch.equal(tensor.detach(), held)  # NaN is not equal, and is written anew


def _unexpanded(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Each number once, where dimensions of a tensor (of `like`) are expanded: such a one takes no copy as a whole."""
    like = tensor if like is None else like
    if type(like.data) is Tensor and like.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
            tensor = tensor.narrow(dim, 0, 1) if size > 1 and stride == 0 else tensor
    return tensor


class _Model:
    def __init__(self, model: nn.Module, apart: Iterable[Any]) -> None:
        self._modules = [(module, dict(vars(module))) for module in model.modules()]
        inside = [value for _, held in self._modules for name, value in held.items() if "_hooks" not in name]
        parameters = list(model.parameters())
        gradients = [(p, p.grad) for p in parameters]
        self._contents = Contents(inside, apart)
        self._values = _Values([*parameters, *model.buffers(), *self._contents.tensors])
        self._gradients = gradients
        for p in parameters:
            p.grad = None

    def restore(self) -> None:
        for module, attributes in self._modules:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            for name, value in attributes.items():
                vars(module)[name] = value
        self._contents.restore()
        for p, gradient in self._gradients:
            p.grad = gradient
        self._values.restore()


class _Optimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # A fused optimizer keeps more than its states on the device.
        self._saved = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, FusedOptimizer) else None
        self._attributes = dict(vars(optimizer))
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._states = {param: dict(state) for param, state in optimizer.state.items()}
        held = [value for state in self._states.values() for value in state.values()]
        own = vars(optimizer).items() if not isinstance(optimizer, FusedOptimizer) else ()
        apart = (optimizer.state, optimizer.param_groups, optimizer.defaults)
        self._contents = Contents([*held, *(value for name, value in own if "_hooks" not in name)], apart)
        rates = [value for _, group in self._groups for value in group.values() if isinstance(value, Tensor)]
        self._values = _Values([*self._contents.tensors, *rates])
        for name in _HOOKS:
            setattr(optimizer, name, OrderedDict())
        for group in optimizer.param_groups:
            if isinstance(group.get("lr"), Tensor):
                group["lr"].zero_()
            elif "lr" in group:
                group["lr"] = 0.0

    def restore(self) -> None:
        optimizer = self._optimizer
        vars(optimizer).clear()
        vars(optimizer).update(self._attributes)
        self._restore_groups()
        self._contents.restore()
        self._values.restore()
        for param in [param for param in optimizer.state if param not in self._states]:
            del optimizer.state[param]
        for param, state in self._states.items():
            optimizer.state[param].clear()
            optimizer.state[param].update(state)
        if self._saved is not None:
            optimizer.load_state_dict(self._saved)
            self._restore_groups()

    def _restore_groups(self) -> None:
        for group, held in self._groups:
            group.clear()
            group.update(held)
        self._optimizer.param_groups[:] = [group for group, _ in self._groups]


class _Random:
    """The generators that a step may draw from."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._host = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in self._devices}
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = (numpy.random, numpy.random.get_state()) if numpy is not None else None
        own = {value for module in model.modules() for value in vars(module).values()
               if isinstance(value, torch.Generator)}  # fmt: skip
        self._generators = [(generator, generator.get_state()) for generator in own]

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy[0].set_state(self._numpy[1])
        for generator, state in self._generators:
            generator.set_state(state)
