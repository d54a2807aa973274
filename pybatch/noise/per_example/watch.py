"""One forward and backward pass under watch.

Every torch function that meets a trainable parameter is seen. Supported ones get the parameter through a gate: an
identity whose backward runs once all uses have delivered their gradients, which is when the norms are taken and what
was kept for them is let go. A parameter met anywhere else is refused by name. What can't be seen (a custom autograd
function, say) reaches the parameter beside its gate, and is noticed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from pybatch.errors import UsageError
from pybatch.noise.norms import SMALL, square, squares
from pybatch.noise.per_example.broadcast import ELEMENTWISE, EXPANDING, SELECTING, collapse, expand_to_batch
from pybatch.noise.per_example.fused import FusedLinear, FusedNorm
from pybatch.noise.per_example.layers import MICRO_BATCHES, RULES, Rule, batch_norm_refusal
from pybatch.noise.per_example.uses import Dense, NormBackward, Outer, Products, Route, Use, dense_norms, squared_norms

# Operations whose input may be a sequence, and the dimensions it has then.
SEQUENCES = {"linear": 3, "matmul": 3, "layer_norm": 3, "rms_norm": 3, "embedding": 2}


@dataclass(frozen=True)
class _Source:
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
        self.settled, self.probing = settled, probing
        self.n, self.open, self.products, self.route, self.unbatched = n, True, products, route, unbatched
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.squares: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self._uses: dict[str, list[Use]] = {}
        self._gates: dict[str, Tensor] = {}
        self._through: dict[str, int] = {}  # address of the gradient that came through the gate
        self._sources: dict[int, _Source] = {}  # by id of a tensor that is kept
        self._kept: list[Tensor] = []
        # Norms taken together at the end, one launch for many: of whole gradients, and of formed per-example ones.
        self._small: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        for name, p in self.names.items():
            self._know(p, _Source(name))
        self._hooks = [_hook(p, partial(self._leaf, name)) for name, p in self.names.items()]

    def close(self) -> None:
        """Let go of everything but the results."""
        self.open = False
        for hook in self._hooks:
            hook.remove()
        for name, norms in dense_norms(self._dense).items():
            self.squares[name] = norms
        self._dense.clear()
        if self._small:
            self.means |= dict(zip(self._small, squares(list(self._small.values())), strict=True))
            self._small.clear()
        self._gates.clear()
        self._uses.clear()
        self._sources.clear()
        self._kept.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function of its interface."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not self.open:
            return func(*args, **kwargs)
        met = [leaf for leaf in _tensors((args, kwargs)) if id(leaf) in self._sources]
        rule = RULES.get(func)
        if not met:
            if rule is not None and rule.name == "batch_norm" and rule.bind(args, kwargs)["training"]:
                raise UsageError(f"per-example norms: {batch_norm_refusal('training')}")
            return func(*args, **kwargs)
        if rule is not None:
            return self._ruled(func, rule, met, args, kwargs)
        if func in ELEMENTWISE:
            return self._elementwise(func, met, args, kwargs)
        if func in SELECTING or func in EXPANDING:
            return self._moved(func, met, args, kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            # Shapes, dtypes and other things without a gradient are free to be read, and so is the parameter itself.
            if isinstance(leaf, Tensor) and leaf.requires_grad and not any(leaf is m for m in met):
                raise self._refusal(func, met, "is not among the operations whose per-example gradients are known")
        return result

    def _ruled(self, func: Any, rule: Rule, met: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = rule.bind(args, kwargs)
        lead, *_ = bound.values()
        parts = rule.parts(**bound)
        wanted = {self._source(bound[key]).name: part for key, part in parts.items() if self._is_whole(bound[key])}
        if len(wanted) != len(met):
            raise self._refusal(func, met, "is known for whole parameters in their usual places only")
        if rule.name == "embedding" and self._is_unbatched(next(iter(wanted)), lead):
            return self._moved(func, met, args, kwargs, index=lead)
        if lead.shape[0] != self.n:
            why = (
                f"has an input of shape {tuple(lead.shape)}, and the batch has {self.n} examples: the batch dimension "
                "must be the first, and examples must not be split or merged"
            )
            raise self._refusal(func, met, why)
        if lead.ndim >= SEQUENCES.get(rule.name, lead.ndim + 1):
            self._refuse_ambiguous(lead.shape, func, met)
        if rule.name == "linear" and self._fuses(bound):
            return self._fused(bound, wanted, func, met)
        if rule.name in ("layer_norm", "rms_norm"):
            backward = self.products.norm_backward(lead, bound["normalized_shape"])
            if backward is not None:
                return self._fused_norm(rule, bound, wanted, backward, func, met)
        output = func(*self._gated(args), **self._gated(kwargs))
        if output.requires_grad:
            version = lead._version
            _hook(output, lambda grad: self._arrived(wanted, grad, func, met, lead._version == version))
        return output

    def _refuse_ambiguous(self, shape: torch.Size, func: Any, met: list[Tensor]) -> None:
        """Batch first or sequence first: sizes that are equal don't tell, and norms over positions would be wrong."""
        if shape[1] == self.n and not (self.settled or self.probing):
            why = (
                f"has an input of shape {tuple(shape)} for {self.n} examples: either of its first two dimensions may "
                "be the batch. Call recorder.probe(...) before, or begin with a batch of another size"
            )
            raise self._refusal(func, met, why)

    def _fuses(self, bound: dict[str, Any]) -> bool:
        """Whether a linear layer's weight gradient is formed with its norms, in the library's place."""
        weight, route = bound["weight"], self.route
        if not self._is_whole(weight) or self._source(weight).name in self._gates or route not in ("auto", "fused"):
            return False  # at a second use of a weight its norms need both, and are taken later
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return False  # checkpointing runs this again, then as a second use, and wants the same tensors saved
        t = bound["input"].shape[1:-1].numel()
        return route == "fused" or self.products.fuses(t, *weight.shape)

    def _fused(
        self, bound: dict[str, Any], wanted: dict[str, Callable[[Tensor], Use]], func: Any, met: list[Tensor]
    ) -> Any:
        input, weight, bias = (self._gated(bound[key]) for key in ("input", "weight", "bias"))
        name = self._source(bound["weight"]).name

        def arrived(grad: Tensor, norm: Tensor) -> None:
            use = wanted[name](grad)
            assert isinstance(use, Outer)
            self._arrived(wanted | {name: lambda _: dataclasses.replace(use, norm=norm)}, grad, func, met)

        return FusedLinear.apply(input, weight, bias, self.products, arrived)  # type: ignore[no-untyped-call]

    def _fused_norm(
        self,
        rule: Rule,
        bound: dict[str, Any],
        wanted: dict[str, Callable[[Tensor], Use]],
        backward: NormBackward,
        func: Any,
        met: list[Tensor],
    ) -> Any:
        input, weight, bias = (self._gated(bound.get(key)) for key in ("input", "weight", "bias"))
        given = (bound["weight"], bound.get("bias"))
        names = [self._source(t).name if t is not None and self._is_whole(t) else None for t in given]

        def arrived(grad: Tensor, scaled: Tensor, plain: Tensor) -> None:
            found = dict(zip(names, (scaled, plain), strict=True))
            self._arrived({name: partial(_dense, found[name]) for name in wanted}, grad, func, met)

        eps = torch.finfo(input.dtype).eps if bound["eps"] is None else bound["eps"]
        centred = rule.name == "layer_norm"
        return FusedNorm.apply(input, weight, bias, eps, centred, backward, arrived)  # type: ignore[no-untyped-call]

    def _is_whole(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._sources and self._source(value).elements is None

    def _know(self, tensor: Tensor, source: _Source) -> None:
        self._kept.append(tensor)
        self._sources[id(tensor)] = source

    def _source(self, tensor: Tensor) -> _Source:
        return self._sources[id(tensor)]

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

    def _elementwise(self, func: Any, met: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        others = [leaf for leaf in _tensors((args, kwargs)) if id(leaf) not in self._sources]
        shape = torch.broadcast_shapes(*(t.shape for t in (*others, *met)))  # type: ignore[no-untyped-call]
        if not any(t.ndim == len(shape) > 0 and t.shape[0] == self.n for t in others) or shape[0] != self.n:
            raise self._refusal(func, met, "does not combine it with a tensor that has the batch dimension in front")
        if len(shape) == SEQUENCES["linear"]:
            self._refuse_ambiguous(shape, func, met)
        replaced: dict[int, Tensor] = {}
        for own in met:
            source = self._source(own)
            expanded = expand_to_batch(self._open(own), shape)
            if expanded is None:
                why = f"has shape {tuple(own.shape)}, with a size of its own where the batch dimension is"
                raise self._refusal(func, met, why)
            self._watch_dense(expanded, source, own.shape)
            replaced[id(own)] = expanded
        return func(*_replace(args, replaced), **_replace(kwargs, replaced))

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
            raise self._refusal(func, met, "takes more than one of them")
        source = self._source(own)
        opened = self._open(own)
        result = func(*_replace(args, {id(own): opened}), **_replace(kwargs, {id(own): opened}))
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        if func in EXPANDING and result.ndim and result.shape[0] == self.n != 1 and _grows(own, result):
            self._watch_dense(result, source, own.shape)
            return result
        if func is Tensor.repeat:
            raise self._refusal(func, met, "repeats it inside an example. Use expand")
        parameter = self.names[source.name]

        def elements() -> Tensor:
            if source.elements is not None:
                numbers = source.elements()
            else:
                numbers = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
            moved: Tensor = (
                numbers[index]
                if index is not None
                else func(*_replace(args, {id(own): numbers}), **_replace(kwargs, {id(own): numbers}))
            )
            return moved

        self._know(result, _Source(source.name, elements))
        return result

    def _watch_dense(self, expanded: Tensor, source: _Source, own: torch.Size) -> None:
        def use(grad: Tensor) -> Use:
            return Dense(collapse(grad, own), source.elements)

        _hook(expanded, lambda grad: self._arrived({source.name: use}, grad))

    def _open(self, tensor: Tensor) -> Tensor:
        """The tensor behind its gate; a selection was taken behind it already."""
        source = self._source(tensor)
        return tensor if source.elements is not None else self._gate(source.name)

    def _gate(self, name: str) -> Tensor:
        if name not in self._gates:
            call = partial(self._complete, name)
            self._gates[name] = _Gate.apply(self.names[name], call)  # type: ignore[no-untyped-call]
        return self._gates[name]

    def _gated(self, values: Any) -> Any:
        found = [leaf for leaf in _tensors((values,)) if id(leaf) in self._sources]
        return _replace(values, {id(leaf): self._open(leaf) for leaf in found})

    def _arrived(
        self,
        parts: dict[str, Callable[[Tensor], Use]],
        grad: Tensor,
        func: Any = None,
        met: list[Tensor] | None = None,
        unchanged: bool = True,
    ) -> None:
        """The gradient of an output: what it adds to each parameter is kept until all have come."""
        if not self.open:
            return
        if not unchanged:
            raise self._refusal(func, met or [], "has an input that was changed in place after it")
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

    def _refusal(self, func: Any, met: list[Tensor], why: str) -> UsageError:
        names = sorted({self._source(m).name for m in met})
        what = resolve_name(func) or getattr(func, "__name__", str(func))
        subject = "parameter" if len(names) == 1 else "parameters"
        return UsageError(
            f"per-example norms: {what} on {subject} {', '.join(map(repr, names))} {why}. "
            f"Freeze the {subject}, or use source='micro-batches'."
        )


def _dense(values: Tensor, _grad: Tensor) -> Use:
    return Dense(values)


def _hook(tensor: Tensor, call: Callable[[Tensor], None]) -> Any:
    return tensor.register_hook(call)  # type: ignore[no-untyped-call]


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


def _replace(values: Any, by: dict[int, Tensor]) -> Any:
    """The same with some tensors in place of others. One in a container of another kind stays, and is refused later."""
    if isinstance(values, Tensor):
        return by.get(id(values), values)
    if type(values) in (tuple, list):
        return type(values)(_replace(value, by) for value in values)
    if type(values) is dict:
        return {key: _replace(value, by) for key, value in values.items()}
    return values


def _grows(own: Tensor, result: Tensor) -> bool:
    """Whether an expansion gave the tensor a batch dimension, and grew no other but of size 1."""
    missing = result.ndim - own.ndim
    inner = own.shape if missing else own.shape[1:]
    sizes = zip(reversed(inner), reversed(result.shape[1:]), strict=False)
    return (missing > 0 or own.shape[0] == 1) and all(mine in (1, size) for mine, size in sizes)
