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

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@contextmanager
def put_back(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """In here steps may be made; afterwards all is as it was, and every tensor the same object.

    Parameters, gradients, buffers and other tensors and attributes of modules, states and groups of the optimizers,
    and the random generators of torch, NumPy, Python and of the modules. Rates are 0 in here, so that repeated steps
    over one batch lead nowhere, and hooks of the optimizers' own do not run.
    """
    kept: list[_Kept] = [_Model(model), *(_Optimizer(optimizer) for optimizer in optimizers), _Random(model)]
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
                tensor.copy_(held)


def _copied(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()


def _same(tensor: Tensor, held: Tensor) -> bool:
    """Whether it holds the same on the host, where looking is cheap; a GPU's are written anew."""
    if tensor.device.type != "cpu" or type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    return torch.equal(tensor.detach(), held)  # NaN is not equal, and is written anew


class _Model:
    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _attributes(module)) for module in model.modules()]
        own = [value for m, _ in self._modules for value in vars(m).values() if isinstance(value, Tensor)]
        parameters = list(model.parameters())
        self._values = _Values([*parameters, *model.buffers(), *own])
        self._gradients = [(p, p.grad) for p in parameters]
        for p in parameters:
            p.grad = None

    def restore(self) -> None:
        for module, attributes in self._modules:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            for name, value in attributes.items():
                if isinstance(value, _Entries):
                    value.restore()
                else:
                    vars(module)[name] = value
        for p, gradient in self._gradients:
            p.grad = gradient
        self._values.restore()


class _Entries:
    """A dictionary or list of a module, with what it held."""

    def __init__(self, holder: Any) -> None:
        self._holder, self._held = holder, holder.copy()

    def restore(self) -> None:
        if isinstance(self._holder, list):
            self._holder[:] = self._held
        elif [(k, id(v)) for k, v in self._holder.items()] != [(k, id(v)) for k, v in self._held.items()]:
            self._holder.clear()
            self._holder.update(self._held)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's attributes are; of its plain dictionaries and lists their entries."""
    own = {}
    for name, value in vars(module).items():
        inside = name in ("_parameters", "_buffers", "_modules") or type(value) is list
        own[name] = _Entries(value) if inside and type(value) in (dict, list, OrderedDict) else value
    return own


class _Optimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # A fused optimizer keeps more than its states on the device.
        self._saved = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, FusedOptimizer) else None
        self._attributes = dict(vars(optimizer))
        self._groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._states = {param: dict(state) for param, state in optimizer.state.items()}
        held = [value for state in self._states.values() for value in state.values()]
        rates = [value for _, group in self._groups for value in group.values() if isinstance(value, Tensor)]
        self._values = _Values([*(value for value in held if isinstance(value, Tensor)), *rates])
        self._plain = {
            param: {name: copy.deepcopy(value) for name, value in state.items() if _changeable(value)}
            for param, state in self._states.items()
        }
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
        self._values.restore()
        for param in [param for param in optimizer.state if param not in self._states]:
            del optimizer.state[param]
        for param, state in self._states.items():
            optimizer.state[param].clear()
            optimizer.state[param].update(state | self._plain[param])
        if self._saved is not None:
            optimizer.load_state_dict(self._saved)
            self._restore_groups()

    def _restore_groups(self) -> None:
        for group, held in self._groups:
            group.clear()
            group.update(held)
        self._optimizer.param_groups[:] = [group for group, _ in self._groups]


def _changeable(value: Any) -> bool:
    return not isinstance(value, Tensor | int | float | str | bytes | tuple | type(None))


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
