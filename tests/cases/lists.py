"""Lists of plain tensors for the kernels, below any optimizer: every rule with its hyper-parameters and reference."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from cases.catalogue import OPTIMIZERS
from cases.problem import same_bits

from pybatch import ops

LR = 0.05
UNITS = 64
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rule:
    """Its own hyper-parameters, and the same for the float64 reference."""

    hyper: dict[str, float]
    options: dict[str, object]
    reference: object


RULES = {
    name: Rule(hyper, options, *(own or [case.reference]))
    for case in OPTIMIZERS
    for name, (hyper, options, *own) in case.RULES.items()
}
# Hyper-parameters whose term is left out where they are 0: decay, Nesterov's look-ahead, LARS's momentum.
LEFT_OUT = ("weight_decay", "nesterov")


def zeroed(rule):
    """A rule's hyper-parameters with every coefficient at 0 whose term is then left out."""
    own = RULES[rule].hyper | {name: 0.0 for name in LEFT_OUT if name in RULES[rule].hyper}
    return own | ({"momentum": 0.0} if rule == "Lars" else {})


def infinities(setup):
    """Run a rule, its coefficients zeroed, where 0 times infinity would show; returns the tensor that has them.

    Its elements 0 and 1 are infinite; the gradient of element 2 is, where that alone makes no NaN.
    """
    i = max(range(len(setup.params)), key=lambda i: 3 <= len(setup.params[i]) <= 37 and len(setup.params[i]))
    setup.list.set_hyper([ops.RULES[setup.rule].row(LR, zeroed(setup.rule))])
    if setup.rule == "Lars":  # a norm of infinite parameters would decide all; momentum is 0 here
        setup.states[i][0][:2] = math.inf
    elif setup.rule != "Lamb":
        setup.params[i][:2] = torch.tensor([-math.inf, math.inf])
    counts = [len(p) for p in setup.params]
    grads = draw(counts, seed=1)
    grads[i][:2] = torch.tensor([1.0, -1.0])
    if setup.rule in ("Sgd", "SgdMomentum", "MuonMomentum"):
        grads[i][2] = math.inf
    setup.step(grads, norm=ops.RULES[setup.rule].norms != "none")
    return setup.params[i]


def unscale(setup, dtype=torch.float32, whole=False):
    """A GradScaler's steps: one that is taken leaves the gradients divided by the scale, one that is skipped as is."""
    scale, grads = torch.tensor(8.0), draw([len(p) for p in setup.params], dtype, seed=3, whole=whole)
    setup.backend.more = {"grad_scale": scale}  # what an emulated device sees
    for bad in (False, True):
        if bad:
            next(g for g in reversed(grads) if len(g))[-1] = math.inf
        wanted = [g.clone() if bad else g / 8 for g in grads]
        setup.step(grads, norm=True, clip=True, max_norm=300.0, grad_scale=scale.data_ptr(), unscale=True)
        assert same_bits(grads, wanted)
    assert float(setup.ledger["skip"]) == 1.0


def sizes(chunk=ops.CppBackend.chunk):
    """Empty, one element, around a chunk's end, two chunks and a bit."""
    return [5, 0, 1, chunk - 1, chunk, chunk + 1, 37, 2 * chunk + 33]


def draw(counts, dtype=torch.float32, seed=0, turn=0, whole=False):
    """Random tensors of these sizes; every other one, from the second on, does not start at a vector's boundary.

    turn: 1: from the first on.
    whole: multiples of 1 / UNITS of at most 8 bits, which every dtype holds. 256 of their squares, or 64 of those of
        sums of two, add up in fp32 without rounding, in whatever order: norms agree to the last bit, or are of others.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n + (i + turn) % 2, generator=generator) for i, n in enumerate(counts)]
    if whole:
        made = [(tensor * UNITS).round().clamp(-255, 255) / UNITS for tensor in made]
    return [tensor.to(dtype)[(i + turn) % 2 :] for i, tensor in enumerate(made)]


def are_whole(tensors):
    """Whether they are such numbers, or sums of some."""
    units = (tensor.double() * UNITS for tensor in tensors if tensor is not None)
    return all(bool((tensor == tensor.round()).all()) for tensor in units)


class Told(NamedTuple):
    """What a step left behind, which a later one may hide: the ledger, norms of the tensors, and whether squares of its
    gradients and of the parameters before it add up without rounding."""

    ledger: torch.Tensor
    norms: torch.Tensor
    whole_gradients: bool
    whole_params: bool


@dataclass
class Setup:
    """A list of tensors and what it was made from; `step` sets the gradients and runs the backend."""

    params: list
    rule: str
    storage: str | None = None
    seed: int = 7
    shares: list | None = None
    layers: torch.Tensor | None = None
    maximize: bool = False
    state_type: str = "fp32"
    backend: ops.Backend = field(default_factory=ops.CppBackend)
    shifted: tuple = ()  # indices of tensors whose states do not start at a vector's boundary
    ledger: ops.Ledger = field(init=False)
    grads: list = field(init=False, default_factory=list)  # of the last call
    sums: list = field(init=False, default_factory=list)
    told: list = field(init=False, default_factory=list)  # after each step

    def __post_init__(self):
        count = ops.RULES[self.rule].states
        storage = self.storage or ""
        self.ledger = ops.Ledger(CPU)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[self.state_type]
        firsts = [int(i in self.shifted) for i in range(len(self.params))]
        self.states = [
            tuple(torch.zeros(len(p) + first, dtype=dtype)[first:] for _ in range(count))
            for p, first in zip(self.params, firsts, strict=True)
        ]
        scaled = count if self.state_type == "8bit" else 0
        self.scales = [tuple(torch.zeros(ops.scale_count(len(p))) for _ in range(scaled)) for p in self.params]
        self.masters = [None] * len(self.params)
        if storage.endswith("_master"):
            self.masters = [p.float() for p in self.params]
        elif storage.endswith("_remainder"):
            self.masters = [torch.zeros(len(p), dtype=torch.int16) for p in self.params]
        shares = self.shares or [1.0] * len(self.params)
        entries = [
            ops.Entry(p, states, self.rule, 0, 0.0, self.storage, master, salt, share, scales=scales)
            for salt, (p, states, scales, master, share) in enumerate(
                zip(self.params, self.states, self.scales, self.masters, shares, strict=True)
            )
        ]
        self.list = ops.TensorList(entries, 1, self.ledger, self.backend.chunk, self.layers, self.state_type)
        self.set_rate(LR)

    def set_rate(self, lr):
        self.set_hyper(lr, **RULES[self.rule].hyper)

    def set_hyper(self, lr, **own):
        self.list.set_hyper([ops.RULES[self.rule].row(lr, own, maximize=self.maximize)])

    def call(self, grads, **scalars):
        """The call of one step on these gradients (None: no gradient)."""
        self.grads = grads
        self.list.set("grad", [0 if g is None else g.data_ptr() or 1 for g in grads])
        self.list.set("grad_type", [0 if g is None else ops.DTYPES[g.dtype] for g in grads])
        call = ops.Call()
        call.inverse, call.seed = 1.0, self.seed
        for name, value in scalars.items():
            setattr(call, name, value)
        return call

    def step(self, grads, reduce=None, **scalars):
        whole = are_whole(self.sums if scalars.get("sum") else grads), are_whole(self.values())
        self.backend.step(self.list, self.call(grads, **scalars), reduce)
        self.told.append(Told(self.ledger.values.clone(), self.list.norms.clone(), *whole))

    def accumulate(self, grads, n, first=False, weight=1.0):
        if first:
            self.sums = [torch.empty(len(p)) for p in self.params]
            self.list.set("sum", [s.data_ptr() or 1 for s in self.sums])
        self.list.set("fresh", [int(first)] * len(self.params))
        self.backend.accumulate(self.list, self.call(grads, examples=n, weight=weight))

    def values(self):
        """The parameters' fp32 values: masters where there are any."""
        if (self.storage or "").endswith("_remainder"):
            return [join(p, low) for p, low in zip(self.params, self.masters, strict=True)]
        return [p.float() if m is None else m for p, m in zip(self.params, self.masters, strict=True)]

    def wide_states(self):
        """The states' fp32 values, those of the first tensor first."""
        if self.state_type != "8bit":
            return [s.float() for of in self.states for s in of]
        squares = ops.RULES[self.rule].squares
        return [
            ops.from_codes(codes, scale, has_sign=not squares >> k & 1)
            for states, scales in zip(self.states, self.scales, strict=True)
            for k, (codes, scale) in enumerate(zip(states, scales, strict=True))
        ]

    def bits(self):
        """All that a step writes."""
        kept = [s for of in [*self.states, *self.scales] for s in of]
        return [t.clone() for t in [*self.params, *kept, *self.values()]]


def join(param, low):
    """The fp32 value of bf16 plus remainder."""
    high = param.view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    bits = ((high << 16) + low.numpy().astype(np.int64)) & 0xFFFFFFFF
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def follow(setup, gradients, reference, lr=LR, scale=1.0):
    """Float64 parameters after one step per item of `gradients`, from the setup's present ones."""
    rule = RULES[setup.rule]
    wanted = [p.double().numpy().copy() for p in setup.params]
    states = [{} for _ in wanted]
    for grads in gradients:
        for i, g in enumerate(grads):
            if g is not None:
                wanted[i] = reference(wanted[i], g.double().numpy() * scale, states[i], lr, **rule.options)
    return wanted
