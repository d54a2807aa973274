"""One forward and backward pass under watch.

Every torch function that meets a trainable parameter is seen. Supported ones get the parameter through a gate: an
identity whose backward runs once all uses have delivered their gradients, which is when the norms are taken and what
was kept for them is let go. A parameter met anywhere else is refused by name. What can't be seen (a custom autograd
function, say) reaches the parameter beside its gate, and is noticed there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pybatch.base.errors import UsageError
from pybatch.noise.norms import SMALL, square, squares
from pybatch.noise.per_example.gates import Gates
from pybatch.noise.per_example.layers import MICRO_BATCHES
from pybatch.noise.per_example.operations import Operations, Parts, hook
from pybatch.noise.per_example.uses import Dense, Products, Route, Use, dense_norms, squared_norms


class Pass(TorchFunctionMode):
    """One forward and backward pass of n examples under watch; `squares` and `means` hold what it found by name.

    `unbatched` is kept by the caller from pass to pass: per looked-up parameter, whether its index carries no batch.
    `settled`: a batch of another size was seen. `probing`: one will be, before any norm is used.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        products: Products,
        route: Route,
        unbatched: dict[str, bool],
        settled: bool,
        probing: bool,
    ) -> None:
        super().__init__()
        self.open, self.products, self.route = True, products, route
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.squares: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self._uses: dict[str, list[Use]] = {}
        self._through: dict[str, int] = {}  # address of the gradient that came through the gate
        # Norms taken together at the end, one launch for many: of whole gradients, and of formed per-example ones.
        self._small: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._gates = Gates(self.names, self._complete)
        self._operations = Operations(n, self._gates, products, route, self._arrived, unbatched, settled, probing)
        self._hooks = [hook(p, partial(self._leaf, name)) for name, p in self.names.items()]

    def unhook(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._hooks:
            handle.remove()

    def close(self) -> None:
        """Let go of everything but the results."""
        self.open = False
        self.unhook()
        for name, norms in dense_norms(self._dense).items():
            self.squares[name] = norms
        self._dense.clear()
        if self._small:
            self.means |= dict(zip(self._small, squares(list(self._small.values())), strict=True))
            self._small.clear()
        self._uses.clear()
        self._gates.close()
        # Both call back here: a circle that would keep parameters until the collector comes.
        del self._gates, self._operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function of its interface."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not self.open:
            return func(*args, **kwargs)
        return self._operations.run(func, args, kwargs)

    def _arrived(
        self,
        parts: Parts,
        grad: Tensor,
        func: Any = None,
        met: list[Tensor] | None = None,
        unchanged: bool = True,
    ) -> None:
        """The gradient of an output: what it adds to each parameter is kept until all have come."""
        if not self.open:
            return
        if not unchanged:
            raise self._gates.refusal(func, met or [], "has an input that was changed in place after it")
        with torch.no_grad():
            for name, part in parts.items():
                self._uses.setdefault(name, []).append(part(grad))

    def _complete(self, name: str, grad: Tensor) -> None:
        """All uses of a parameter have delivered: take its norms."""
        if not self.open:
            return
        if name in self.squares or name in self._dense:
            raise UsageError(
                f"per-example norms: the gradient of {name!r} arrived twice. Run one backward pass in each block, and "
                "no reentrant checkpointing."
            )
        self._through[name] = grad.data_ptr()
        with torch.no_grad():
            uses = self._uses.pop(name)
            if isinstance(uses[0], Dense) and len(uses) == 1 and uses[0].short:
                self._dense[name] = uses[0].values
                return
            self.squares[name] = squared_norms(uses, self.names[name].shape, name, self.products, self.route)

    def _leaf(self, name: str, grad: Tensor) -> None:
        if not self.open:
            return
        if self._through.get(name) != grad.data_ptr():
            raise UsageError(
                f"per-example norms: parameter {name!r} is also used where it can't be seen (a custom autograd "
                f"function, compiled code), or a hook changes its gradient. {MICRO_BATCHES}."
            )
        if grad.numel() <= SMALL and grad.dtype != torch.float64:
            self._small[name] = grad  # held: `.grad` becomes a copy of it, which is small
            return
        with torch.no_grad():
            self.means[name] = square(grad)
