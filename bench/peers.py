"""Other optimizers that the step benchmarks run beside ours, in the same process. None is required.

A maker takes the parameters and gives an object with `step()`, set to the hyper-parameters in HYPER.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

Params = list[torch.nn.Parameter]

# One setting for all sides, the defaults of torch where it has the optimizer.
LR, MOMENTUM, TRUST = 1e-3, 0.9, 1e-3
DECAY = {"SGD": 0.0, "Adam": 0.0, "AdamW": 0.01, "Lion": 0.01, "LARS": 1e-4, "LAMB": 0.01, "Muon": 0.1}
LION_BETAS, BETAS, LAMB_EPS = (0.9, 0.99), (0.9, 0.999), 1e-6


class Peer(NamedTuple):
    """How to make a peer, and whether it keeps fp32 masters of bf16 parameters by itself."""

    make: Callable[[Params], Any]
    own_master: bool = False


class ForeachLion:
    """Lion as one writes it with torch's multi-tensor functions."""

    def __init__(self, params: Params) -> None:
        self.params, self.momenta = list(params), [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        moves = torch._foreach_lerp(self.momenta, grads, 1.0 - LION_BETAS[0])
        torch._foreach_sign_(moves)
        torch._foreach_mul_(self.params, 1.0 - LR * DECAY["Lion"])
        torch._foreach_add_(self.params, moves, alpha=-LR)
        torch._foreach_lerp_(self.momenta, grads, 1.0 - LION_BETAS[1])


class ForeachLARS:
    """LARS as one writes it with torch's multi-tensor functions."""

    def __init__(self, params: Params) -> None:
        self.params, self.momenta = list(params), [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        p_norm, g_norm = torch.stack(torch._foreach_norm(self.params)), torch.stack(torch._foreach_norm(grads))
        rates = TRUST * p_norm / (g_norm + DECAY["LARS"] * p_norm)
        moves = torch._foreach_add(grads, self.params, alpha=DECAY["LARS"])
        torch._foreach_mul_(moves, list(rates.unbind()))
        torch._foreach_mul_(self.momenta, MOMENTUM)
        torch._foreach_add_(self.momenta, moves)
        torch._foreach_add_(self.params, self.momenta, alpha=-LR)


class ForeachLAMB:
    """LAMB as one writes it with torch's multi-tensor functions."""

    def __init__(self, params: Params) -> None:
        self.params, self.steps = list(params), 0
        self.first, self.second = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        grads = [p.grad for p in self.params]
        torch._foreach_lerp_(self.first, grads, 1.0 - BETAS[0])
        torch._foreach_mul_(self.second, BETAS[1])
        torch._foreach_addcmul_(self.second, grads, grads, 1.0 - BETAS[1])
        denominators = torch._foreach_div(self.second, 1.0 - BETAS[1] ** self.steps)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, LAMB_EPS)
        moves = torch._foreach_div(self.first, 1.0 - BETAS[0] ** self.steps)
        torch._foreach_div_(moves, denominators)
        torch._foreach_add_(moves, self.params, alpha=DECAY["LAMB"])
        p_norm, u_norm = torch.stack(torch._foreach_norm(self.params)), torch.stack(torch._foreach_norm(moves))
        torch._foreach_mul_(moves, list((p_norm / u_norm).unbind()))
        torch._foreach_add_(self.params, moves, alpha=-LR)


class TorchMuon:
    """torch.optim.Muon for the matrices and fused AdamW for the others: two optimizers, one step."""

    def __init__(self, params: Params) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if matrices := [p for p in params if p.dim() == 2]:
            self.parts.append(torch.optim.Muon(matrices, lr=LR))
        if others := [p for p in params if p.dim() != 2]:
            self.parts.append(torch.optim.AdamW(others, lr=LR, weight_decay=DECAY["Muon"], fused=True))

    def step(self) -> None:
        for part in self.parts:
            part.step()


def of_torch(name: str) -> dict[str, Peer]:
    """torch's own: fused and foreach; for what it lacks, its multi-tensor functions."""
    composed = {"Lion": ForeachLion, "LARS": ForeachLARS, "LAMB": ForeachLAMB, "Muon": TorchMuon}.get(name)
    if composed is not None:
        return {"torch" if name == "Muon" else "torch foreach": Peer(composed)}
    more = {"momentum": MOMENTUM} if name == "SGD" else {}
    kind = getattr(torch.optim, name)

    def maker(how: str) -> Callable[[Params], Any]:
        return lambda params: kind(params, lr=LR, weight_decay=DECAY[name], **more, **{how: True})

    return {f"torch {how}": Peer(maker(how)) for how in ("fused", "foreach")}


def of_optimi(name: str) -> dict[str, Peer]:
    """torch-optimi."""
    kind = getattr(import_module("optimi"), name, None)
    if kind is None:
        return {}
    more: dict[str, Any] = {"SGD": {"momentum": MOMENTUM}, "Lion": {"betas": LION_BETAS}}.get(name, {"betas": BETAS})
    if name in ("Adam", "AdamW"):
        more["eps"] = 1e-8
    return {"optimi": Peer(lambda params: kind(params, lr=LR, weight_decay=DECAY[name], **more))}


def of_apex(name: str) -> dict[str, Peer]:
    """NVIDIA apex; only on CUDA."""
    apex = import_module("apex.optimizers")
    decay = DECAY[name]
    if name == "SGD":
        return {"apex": Peer(lambda params: apex.FusedSGD(params, lr=LR, momentum=MOMENTUM, weight_decay=decay))}
    if name in ("Adam", "AdamW"):
        return {
            "apex": Peer(
                lambda params: apex.FusedAdam(params, lr=LR, weight_decay=decay, adam_w_mode=name == "AdamW"),
            )
        }
    if name == "LAMB":  # its own clipping is set out of reach
        return {
            "apex": Peer(lambda params: apex.FusedLAMB(params, lr=LR, weight_decay=decay, eps=1e-6, max_grad_norm=1e30))
        }
    return {}


def of_bitsandbytes(name: str) -> dict[str, Peer]:
    """bitsandbytes with 32-bit states; only on CUDA."""
    optim = import_module("bitsandbytes").optim
    more = {"SGD": {"momentum": MOMENTUM}, "Lion": {"betas": LION_BETAS}}.get(name, {})
    kind = getattr(optim, name + "32bit", None) if name in ("SGD", "Adam", "AdamW", "Lion") else None
    if kind is None:
        return {}
    return {"bitsandbytes": Peer(lambda params: kind(params, lr=LR, weight_decay=DECAY[name], **more))}


def of_transformer_engine(name: str) -> dict[str, Peer]:
    """NVIDIA TransformerEngine; only on CUDA. It keeps masters itself."""
    optimizers = import_module("transformer_engine.pytorch.optimizers")
    if name not in ("Adam", "AdamW"):
        return {}

    def make(params: Params) -> Any:
        return optimizers.FusedAdam(
            params,
            lr=LR,
            weight_decay=DECAY[name],
            adam_w_mode=name == "AdamW",
            master_weights=params[0].dtype != torch.float32,
        )

    return {"TransformerEngine": Peer(make, own_master=True)}


SOURCES: Sequence[tuple[str, Callable[[str], dict[str, Peer]], bool]] = (  # name, peers of an optimizer, CUDA only
    ("torch", of_torch, False),
    ("torch-optimi", of_optimi, False),
    ("apex", of_apex, True),
    ("bitsandbytes", of_bitsandbytes, True),
    ("TransformerEngine", of_transformer_engine, True),
)


def peers(name: str, device: torch.device) -> tuple[dict[str, Peer], dict[str, str]]:
    """What can stand beside our optimizer of this name here, and why the others can't."""
    found: dict[str, Peer] = {}
    missing = {}
    for source, of, cuda_only in SOURCES:
        if cuda_only and device.type != "cuda":
            missing[source] = "works on CUDA only"
            continue
        try:
            found |= of(name)
        except Exception as error:  # a broken installation fails in ways of its own
            missing[source] = f"{type(error).__name__}: {error}"
    return found, missing
