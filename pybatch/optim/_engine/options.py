"""pybatch's own arguments of an optimizer, and the form in which an optimizer names its update rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypedDict, Unpack

import torch

from pybatch import ops
from pybatch.base.errors import UsageError

STATE_DTYPES: dict[torch.dtype, Literal["fp32", "bf16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
}  # as torch names them
DEFAULT_SEED = 0  # of stochastic rounding where the user gives none


class OwnOptions(TypedDict, total=False):
    """Keyword arguments that every fused optimizer takes after its hyper-parameters: see `FusedOptimizer`."""

    max_grad_norm: float | None
    noise: bool
    master_weights: bool | Literal["remainder"]
    stochastic_rounding: bool | int
    state_dtype: Literal["fp32", "bf16", "8bit"] | torch.dtype
    backend: str | None
    foreach: bool | None
    fused: bool | None
    differentiable: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """An optimizer's own options as it goes by them; see `FusedOptimizer`. Checked when made.

    Raises:
        UsageError: an argument outside its range, or two that exclude each other.
    """

    max_grad_norm: float | None = None
    noise: bool = False
    master_weights: bool | Literal["remainder"] = False
    stochastic_rounding: bool | int = False
    state_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not float(self.max_grad_norm) > 0.0:
            raise UsageError(f"max_grad_norm {self.max_grad_norm}: a norm is above 0. Give one, or None not to clip.")
        if self.backend is not None and self.backend not in ops.BACKENDS:
            raise UsageError(f"backend {self.backend!r} is not known. Use one of: {', '.join(ops.BACKENDS)}, or None.")
        if self.master_weights not in (False, True, "remainder"):
            raise UsageError(f"master_weights {self.master_weights!r} is not known. Use True, 'remainder' or False.")
        if self.state_dtype not in ops.STATE_TYPES:
            raise UsageError(f"state_dtype {self.state_dtype!r} is not known. Use 'fp32', 'bf16' or '8bit'.")
        seed = self.stochastic_rounding
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UsageError(f"stochastic_rounding {seed!r}: give True, False or a seed from 0 to 2**63 - 1.")
        if self.master_weights and self.stochastic:
            raise UsageError(
                f"master_weights={self.master_weights!r} with stochastic_rounding={seed!r}: with a master nothing is "
                "lost to rounding. Leave one out."
            )

    @classmethod
    def given(cls, optimizer: str, **own: Unpack[OwnOptions]) -> Self:
        """Those among the keyword arguments of an optimizer; TypeError for a name that no optimizer takes."""
        for name in own:
            if name not in OwnOptions.__annotations__:
                raise TypeError(f"{optimizer}() got an unexpected keyword argument {name!r}")
        if own.pop("differentiable", False):
            raise UsageError("differentiable=True: a fused step has no gradient of its own. Use the torch.optim twin.")
        kind = own.get("state_dtype", "fp32")
        if isinstance(kind, torch.dtype) and kind in STATE_DTYPES:
            own["state_dtype"] = STATE_DTYPES[kind]
        own.pop("foreach", None)
        own.pop("fused", None)
        return cls(**own)  # type: ignore[misc, arg-type]

    @property
    def stochastic(self) -> bool:
        """Whether parameters are rounded stochastically: 0 is a seed too."""
        return self.stochastic_rounding is not False

    @property
    def random(self) -> bool:
        """Whether a step draws random bits, for parameters or for states."""
        return self.stochastic or self.state_dtype == "bf16"

    @property
    def seed(self) -> int:
        """Seed of the rounding; True stands for the default one."""
        return DEFAULT_SEED if isinstance(self.stochastic_rounding, bool) else self.stochastic_rounding


def signature(init: Callable[..., None]) -> inspect.Signature:
    """The signature of an optimizer's `__init__` as its class shows it: `**own` written out."""
    _, *given = inspect.signature(init).parameters.values()
    if not given or given[-1].kind != inspect.Parameter.VAR_KEYWORD:
        return inspect.Signature(given)
    names = {parameter.name for parameter in given}
    for name, kind in OwnOptions.__annotations__.items():
        if name not in names:
            default = getattr(Options, name, False if name == "differentiable" else None)
            annotation = getattr(kind, "__forward_arg__", kind)  # text, as those of `init` are
            own = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            given.insert(-1, own)
    return inspect.Signature(given[:-1])


class ParamRule(NamedTuple):
    """How one parameter is updated.

    Attributes:
        name: in kernels/rules.h.
        states: torch's names of its states, in the rule's order.
        scalar: torch's name of what the rule keeps of each tensor from step to step; None: it keeps nothing.
        extra: numbers of this parameter that `_hyper` needs beside its group, such as a factor from its shape.
            Parameters of one group with equal rules share a row of hyper-parameters.
        counts: whether torch's optimizer keeps a state "step". Where it does not, it is kept with random bits alone.
        then: name of the rule of a second pass. The first pass then writes to a bf16 staging tensor instead of the
            parameter; the optimizer's `_transform` turns that into the second pass's gradient. None: one pass.
    """

    name: str
    states: tuple[str, ...] = ()
    extra: tuple[float, ...] = ()
    then: str | None = None
    scalar: str | None = None
    counts: bool = True
