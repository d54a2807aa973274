"""Parameters under watch: which tensors are made of them, and the gate that each goes through to its uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from pybatch.base.errors import UsageError


@dataclass(frozen=True)
class Origin:
    """Which parameter a tensor is made of, and which elements of it (None: all, in order)."""

    name: str
    elements: Callable[[], Tensor] | None = None


class _Gate(torch.autograd.Function):
    """An identity between a parameter and its uses; its backward runs once, with their sum."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.arrived(grad)
        return grad, None


class Gates:
    """What is known of the tensors that are made of parameters.

    Args:
        parameters: by name.
        complete: called with a name and the gradient, once all uses behind that parameter's gate have delivered theirs.
    """

    def __init__(self, parameters: Mapping[str, Tensor], complete: Callable[[str, Tensor], None]) -> None:
        self.parameters, self._complete = parameters, complete
        self._gates: dict[str, Tensor] = {}
        self._origins: dict[int, Origin] = {}  # by id of a tensor that is kept
        self._kept: list[Tensor] = []
        for name, parameter in parameters.items():
            self.know(parameter, Origin(name))

    def close(self) -> None:
        """Let go of the tensors."""
        self._gates.clear()
        self._origins.clear()
        self._kept.clear()

    def split(self, values: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors among the arguments of a function of torch: those made of parameters, and the others."""
        met: list[Tensor] = []
        others: list[Tensor] = []
        for leaf in _tensors(values):
            (met if id(leaf) in self._origins else others).append(leaf)
        return met, others

    def know(self, tensor: Tensor, origin: Origin) -> None:
        """Keep what a tensor is made of."""
        self._kept.append(tensor)
        self._origins[id(tensor)] = origin

    def origin(self, tensor: Tensor) -> Origin:
        """What a known tensor is made of."""
        return self._origins[id(tensor)]

    def is_whole(self, value: Any) -> bool:
        """Whether it is a parameter, all of it and in order."""
        return isinstance(value, Tensor) and id(value) in self._origins and self.origin(value).elements is None

    def is_open(self, name: str) -> bool:
        """Whether the parameter was used before."""
        return name in self._gates

    def open(self, tensor: Tensor) -> Tensor:
        """The tensor behind its gate; a selection was taken behind it already."""
        origin = self.origin(tensor)
        return tensor if origin.elements is not None else self._gate(origin.name)

    def _gate(self, name: str) -> Tensor:
        if name not in self._gates:
            call = partial(self._complete, name)
            self._gates[name] = _Gate.apply(self.parameters[name], call)  # type: ignore[no-untyped-call]
        return self._gates[name]

    def gated(self, values: Any) -> Any:
        """Arguments of a function of torch, with what is made of parameters behind its gates."""
        found, _ = self.split((values,))
        return replace(values, {id(leaf): self.open(leaf) for leaf in found})

    def refusal(self, func: Any, met: list[Tensor], why: str) -> UsageError:
        """The error of an operation on these that can't be measured."""
        names = sorted({self.origin(m).name for m in met})
        what = resolve_name(func) or getattr(func, "__name__", str(func))
        subject = "parameter" if len(names) == 1 else "parameters"
        return UsageError(
            f"per-example norms: {what} on {subject} {', '.join(map(repr, names))} {why}. "
            f"Freeze the {subject}, or use source='micro-batches'."
        )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a function of torch; several times faster than a pytree's leaves."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def replace(values: Any, by: dict[int, Tensor]) -> Any:
    """The same with some tensors in place of others. One in a container of another kind stays, and is refused later."""
    if isinstance(values, Tensor):
        return by.get(id(values), values)
    if type(values) in (tuple, list):
        return type(values)(replace(value, by) for value in values)
    if type(values) is dict:
        return {key: replace(value, by) for key, value in values.items()}
    return values
