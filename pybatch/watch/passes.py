"""One forward and backward pass of a training, kept so that it can be run again at other batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pybatch.base.errors import WorkloadError
from pybatch.noise.outputs import leaves_in
from pybatch.watch.batching import Batching, resized, resized_like

HELD_BYTES = 64 << 20  # of a gradient at an output: a larger one is drawn anew, which takes as long a step


@dataclass
class Pass:
    """The arguments of a forward pass and the gradient that came into its outputs."""

    model: nn.Module
    arguments: Any  # (args, kwargs)
    batching: Batching
    autocast: dict[str, torch.dtype]  # by kind of device, where it was on
    training: bool
    modes: tuple[tuple[nn.Module, bool], ...] = ()  # of each module: a frozen layer may be in evaluation mode
    trained: tuple[tuple[nn.Parameter, bool], ...] = ()  # of each parameter, whether it needed a gradient
    outputs: int = 0  # tensors among the leaves of the output
    gradients: dict[int, Tensor | tuple[int, ...]] = field(default_factory=dict)  # by leaf; a shape: to be drawn
    drawn: bool = False

    @staticmethod
    def begun(model: nn.Module, arguments: Any, batching: Batching) -> Pass:
        """A forward pass with these arguments begins, in the autocast that is on now."""
        modes = tuple((module, module.training) for module in model.modules())
        trained = tuple((p, p.requires_grad) for p in model.parameters())
        return Pass(model, arguments, batching, autocasts(), model.training, modes, trained)

    def keep(self, leaf: int, gradient: Tensor) -> None:
        """The gradient that has come to a leaf of the output."""
        if gradient.numel() * gradient.element_size() > HELD_BYTES:
            self.gradients[leaf], self.drawn = tuple(gradient.shape), True
        else:
            self.gradients[leaf] = gradient.detach()

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """In here modules are in the modes of the pass, which a script that ends with an evaluation has left."""
        now = [(module, module.training) for module, _ in self.modes]
        needed = [(p, p.requires_grad) for p, _ in self.trained]
        try:
            _set(self.modes, self.trained)
            yield
        finally:
            _set(now, needed)

    @property
    def complete(self) -> bool:
        """Whether a gradient came."""
        return bool(self.gradients)


def _set(modes: Iterable[tuple[nn.Module, bool]], trained: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for module, training in modes:
        if module.training != training:  # train() and eval() would go on to the modules inside
            module.training = training
    for p, needed in trained:
        if p.requires_grad != needed:
            p.requires_grad_(needed)


class Loaded:
    """A pass at some batch size, to be run again and again.

    Raises:
        WorkloadError: with the cause, where the model does not take that size, or its outputs do not follow it.
    """

    def __init__(self, kept: Pass, n: int) -> None:
        self._pass, self.n = kept, n
        self._arguments = resized(kept.arguments, kept.batching, n)
        self._gradients: dict[int, Tensor] | None = None

    def run(self) -> None:
        """Forward and backward; gradients are added to `.grad`."""
        outputs = self._forward()
        if self._gradients is None:
            self._gradients = self._sized(outputs)
        chosen = [outputs[leaf] for leaf in self._gradients]
        torch.autograd.backward(chosen, list(self._gradients.values()))

    def _forward(self) -> list[Any]:
        args, kwargs = self._arguments
        with torch.enable_grad(), autocasting(self._pass.autocast):
            return leaves_in(self._pass.model(*args, **kwargs))

    def _sized(self, outputs: list[Any]) -> dict[int, Tensor]:
        kept, made = self._pass, {}
        if len(outputs) != kept.outputs:
            raise WorkloadError(f"the model gives {len(outputs)} outputs where it gave {kept.outputs}")
        follows = []
        for leaf, gradient in kept.gradients.items():
            output = outputs[leaf]
            if not isinstance(output, Tensor) or not output.requires_grad:
                raise WorkloadError("an output that had a gradient has none")
            before = gradient.shape if isinstance(gradient, Tensor) else torch.Size(gradient)
            follows.append(not before or output.shape != before)
            if isinstance(gradient, Tensor):
                made[leaf] = resized_like(gradient, output).to(output.dtype)
            else:
                made[leaf] = torch.randn_like(output) / max(1, output.numel())
        if self.n != kept.batching.size and not any(follows):
            raise WorkloadError(
                f"the model's output has the same shape at batch {self.n} as at {kept.batching.size}: which dimension "
                "of its inputs is the batch can't be told"
            )
        return made


def autocasts() -> dict[str, torch.dtype]:
    """The autocast that is on now, by kind of device."""
    return {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}


@contextmanager
def autocasting(on: dict[str, torch.dtype]) -> Iterator[None]:
    """The autocast that a pass was in, with no weights cached from before."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if kind in on:
                stack.enter_context(torch.autocast(kind, on[kind]))
            elif torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.clear_autocast_cache()
        yield
