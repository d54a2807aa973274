"""Operations on parameters whose per-example gradients are known: each is run so that its uses are watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pybatch.base.errors import UsageError
from pybatch.noise.per_example.broadcast import ELEMENTWISE, EXPANDING, SELECTING, collapse, expand_to_batch
from pybatch.noise.per_example.fused import FusedLinear, FusedNorm
from pybatch.noise.per_example.gates import Gates, Origin, replace
from pybatch.noise.per_example.layers import FORMULAS, LayerFormula, batch_norm_refusal
from pybatch.noise.per_example.uses import Dense, NormBackward, Outer, Products, Route, Use

# Operations whose input may be a sequence, and the dimensions it has then.
SEQUENCES = {"linear": 3, "matmul": 3, "layer_norm": 3, "rms_norm": 3, "embedding": 2}

Parts = dict[str, Callable[[Tensor], Use]]  # what the gradient of an output adds to each parameter, by name


class Arrived(Protocol):
    """Takes the gradient of an output."""

    def __call__(
        self,
        parts: Parts,
        grad: Tensor,
        func: Any = None,
        met: list[Tensor] | None = None,
        unchanged: bool = True,
    ) -> None:
        """Keep what it adds to each parameter; refuse where the operation's input did not stay `unchanged`."""


class Operations:
    """Runs the operations of one pass that meet parameters.

    Args:
        n: examples of the pass.
        gates: of the parameters.
        products, route: how norms are formed, which decides what is fused with the backward pass.
        arrived: called in the backward pass with what each use is made of.
        unbatched: kept from pass to pass: per looked-up parameter, whether its index carries no batch.
        settled: a batch of another size was seen.
        probing: one will be, before any norm is used.
    """

    def __init__(
        self,
        n: int,
        gates: Gates,
        products: Products,
        route: Route,
        arrived: Arrived,
        unbatched: dict[str, bool],
        settled: bool,
        probing: bool,
    ) -> None:
        self.n, self.gates, self.products, self.route, self.arrived = n, gates, products, route, arrived
        self.unbatched, self.settled, self.probing = unbatched, settled, probing

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch, watched where it meets parameters; raises UsageError where that can't be."""
        met, others = self.gates.split((args, kwargs))
        rule = FORMULAS.get(func)
        if not met:
            if rule is not None and rule.name == "batch_norm" and rule.bind(args, kwargs)["training"]:
                raise UsageError(f"per-example norms: {batch_norm_refusal('training')}")
            return func(*args, **kwargs)
        if rule is not None:
            return self._ruled(func, rule, met, args, kwargs)
        if func in ELEMENTWISE:
            return self._elementwise(func, met, others, args, kwargs)
        if func in SELECTING or func in EXPANDING:
            return self._moved(func, met, args, kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            # Shapes, dtypes and other things without a gradient are free to be read, and so is the parameter itself.
            if isinstance(leaf, Tensor) and leaf.requires_grad and not any(leaf is m for m in met):
                raise self.gates.refusal(func, met, "is not among the operations whose per-example gradients are known")
        return result

    def _ruled(
        self, func: Any, rule: LayerFormula, met: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = rule.bind(args, kwargs)
        lead, *_ = bound.values()
        parts = rule.parts(**bound)
        wanted = {
            self.gates.origin(bound[key]).name: part for key, part in parts.items() if self.gates.is_whole(bound[key])
        }
        if len(wanted) != len(met):
            raise self.gates.refusal(func, met, "is known for whole parameters in their usual places only")
        if rule.name == "embedding" and self._is_unbatched(next(iter(wanted)), lead):
            return self._moved(func, met, args, kwargs, index=lead)
        if lead.shape[0] != self.n:
            why = (
                f"has an input of shape {tuple(lead.shape)}, and the batch has {self.n} examples: the batch dimension "
                "must be the first, and examples must not be split or merged"
            )
            raise self.gates.refusal(func, met, why)
        if lead.ndim >= SEQUENCES.get(rule.name, lead.ndim + 1):
            self._refuse_ambiguous(lead.shape, func, met)
        if rule.name == "linear" and self._fuses(bound):
            return self._fused(bound, wanted, func, met)
        if rule.name in ("layer_norm", "rms_norm"):
            backward = self.products.norm_backward(lead, bound["normalized_shape"])
            if backward is not None:
                return self._fused_norm(rule, bound, wanted, backward, func, met)
        output = func(*self.gates.gated(args), **self.gates.gated(kwargs))
        if output.requires_grad:
            version = lead._version
            hook(output, lambda grad: self.arrived(wanted, grad, func, met, lead._version == version))
        return output

    def _refuse_ambiguous(self, shape: torch.Size, func: Any, met: list[Tensor]) -> None:
        """Batch first or sequence first: sizes that are equal don't tell, and norms over positions would be wrong."""
        if shape[1] == self.n and not (self.settled or self.probing):
            why = (
                f"has an input of shape {tuple(shape)} for {self.n} examples: either of its first two dimensions may "
                "be the batch. Call recorder.probe(...) before, or begin with a batch of another size"
            )
            raise self.gates.refusal(func, met, why)

    def _fuses(self, bound: dict[str, Any]) -> bool:
        """Whether a linear layer's weight gradient is formed with its norms, in the library's place."""
        weight, route = bound["weight"], self.route
        if not self.gates.is_whole(weight) or route not in ("auto", "fused"):
            return False
        if self.gates.is_open(self.gates.origin(weight).name):
            return False  # at a second use of a weight its norms need both, and are taken later
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return False  # checkpointing runs this again, then as a second use, and wants the same tensors saved
        t = bound["input"].shape[1:-1].numel()
        return route == "fused" or self.products.fuses(t, *weight.shape)

    def _fused(self, bound: dict[str, Any], wanted: Parts, func: Any, met: list[Tensor]) -> Any:
        input, weight, bias = (self.gates.gated(bound[key]) for key in ("input", "weight", "bias"))
        name = self.gates.origin(bound["weight"]).name

        def arrived(grad: Tensor, norm: Tensor) -> None:
            use = wanted[name](grad)
            assert isinstance(use, Outer)
            self.arrived(wanted | {name: lambda _: dataclasses.replace(use, norm=norm)}, grad, func, met)

        return FusedLinear.apply(input, weight, bias, self.products, arrived)  # type: ignore[no-untyped-call]

    def _fused_norm(
        self,
        rule: LayerFormula,
        bound: dict[str, Any],
        wanted: Parts,
        backward: NormBackward,
        func: Any,
        met: list[Tensor],
    ) -> Any:
        input, weight, bias = (self.gates.gated(bound.get(key)) for key in ("input", "weight", "bias"))
        given = (bound["weight"], bound.get("bias"))
        names = [self.gates.origin(t).name if t is not None and self.gates.is_whole(t) else None for t in given]

        def arrived(grad: Tensor, scaled: Tensor, plain: Tensor) -> None:
            found = dict(zip(names, (scaled, plain), strict=True))
            self.arrived({name: partial(_dense, found[name]) for name in wanted}, grad, func, met)

        eps = torch.finfo(input.dtype).eps if bound["eps"] is None else bound["eps"]
        centred = rule.name == "layer_norm"
        return FusedNorm.apply(input, weight, bias, eps, centred, backward, arrived)  # type: ignore[no-untyped-call]

    def _is_unbatched(self, name: str, index: Tensor) -> bool:
        """Whether a lookup is the same for all examples, as of positions; settled by the first size that tells."""
        has_size = index.ndim > 0 and index.shape[0] == self.n
        if index.ndim > 1 and index.shape[0] not in (1, self.n):
            return False  # neither one row nor one for each example: refused
        if self.n == 1:
            return not has_size
        unbatched = self.unbatched.setdefault(name, not has_size)
        if not unbatched and not has_size and self.probing:
            self.unbatched[name] = unbatched = True  # the size before happened to be the index's
        if not unbatched and not has_size:
            raise UsageError(
                f"per-example norms: parameter {name!r} is looked up by an index that had the batch's size before and "
                f"has shape {tuple(index.shape)} for {self.n} examples now: it carries no batch dimension, and the "
                "earlier norms are wrong. Begin with a batch of another size."
            )
        return unbatched

    def _elementwise(
        self, func: Any, met: list[Tensor], others: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        shape = torch.broadcast_shapes(*(t.shape for t in (*others, *met)))  # type: ignore[no-untyped-call]
        if not any(t.ndim == len(shape) > 0 and t.shape[0] == self.n for t in others) or shape[0] != self.n:
            why = "does not combine it with a tensor that has the batch dimension in front"
            raise self.gates.refusal(func, met, why)
        if len(shape) == SEQUENCES["linear"]:
            self._refuse_ambiguous(shape, func, met)
        replaced: dict[int, Tensor] = {}
        for own in met:
            origin = self.gates.origin(own)
            expanded = expand_to_batch(self.gates.open(own), shape)
            if expanded is None:
                why = f"has shape {tuple(own.shape)}, with a size of its own where the batch dimension is"
                raise self.gates.refusal(func, met, why)
            self._watch_dense(expanded, origin, own.shape)
            replaced[id(own)] = expanded
        return func(*replace(args, replaced), **replace(kwargs, replaced))

    def _moved(
        self,
        func: Any,
        met: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: Tensor | None = None,
    ) -> Any:
        """A selection of a parameter's elements, or its expansion to the batch."""
        own = met[0]
        if any(m is not own for m in met):
            raise self.gates.refusal(func, met, "takes more than one of them")
        origin = self.gates.origin(own)
        opened = self.gates.open(own)
        result = func(*replace(args, {id(own): opened}), **replace(kwargs, {id(own): opened}))
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if func in EXPANDING and result.ndim and result.shape[0] == self.n != 1 and _grows(own, result):
            self._watch_dense(result, origin, own.shape)
            return result
        if func is Tensor.repeat:
            raise self.gates.refusal(func, met, "repeats it inside an example. Use expand")
        parameter = self.gates.parameters[origin.name]

        def elements() -> Tensor:
            if origin.elements is not None:
                numbers = origin.elements()
            else:
                numbers = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
            moved: Tensor = (
                numbers[index]
                if index is not None
                else func(*replace(args, {id(own): numbers}), **replace(kwargs, {id(own): numbers}))
            )
            return moved

        self.gates.know(result, Origin(origin.name, elements))
        return result

    def _watch_dense(self, expanded: Tensor, origin: Origin, own: torch.Size) -> None:
        def use(grad: Tensor) -> Use:
            return Dense(collapse(grad, own), origin.elements)

        hook(expanded, lambda grad: self.arrived({origin.name: use}, grad))


def _dense(values: Tensor, _grad: Tensor) -> Use:
    return Dense(values)


def hook(tensor: Tensor, call: Callable[[Tensor], None]) -> Any:
    """Call it with the tensor's gradient; returns the hook's handle."""
    return tensor.register_hook(call)  # type: ignore[no-untyped-call]


def _grows(own: Tensor, result: Tensor) -> bool:
    """Whether an expansion gave the tensor a batch dimension, and grew no other but of size 1."""
    missing = result.ndim - own.ndim
    inner = own.shape if missing else own.shape[1:]
    sizes = zip(reversed(inner), reversed(result.shape[1:]), strict=False)
    return (missing > 0 or own.shape[0] == 1) and all(mine in (1, size) for mine, size in sizes)
