"""Muon: momentum orthogonalized by Newton-Schulz, and AdamW for what is no hidden matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, ClassVar, Unpack

import torch

from pybatch.base.errors import UsageError
from pybatch.optim._engine import matrices, newton_schulz, zero
from pybatch.optim._engine.arguments import check_betas, check_hyper, is_device_scalar
from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim._engine.matrices import Whole
from pybatch.optim._engine.options import OwnOptions, ParamRule

ADJUSTMENTS = (None, "original", "match_rms_adamw")


class Muon(FusedOptimizer):
    """`torch.optim.Muon` with its element-wise parts fused and its matrix products batched (Jordan et al. 2024).

    m <- m + (1 - momentum) (g - m);  u = g + momentum (m - g) with nesterov, else m;  o = NewtonSchulz(u);
    p <- p (1 - lr wd) - lr adjust(shape) o.  The products are in bf16, over all matrices of one shape at once; the
    momentum is in fp32, and a bf16 copy of each matrix is kept to work in. https://kellerjordan.github.io/posts/muon/

    Unlike torch's, one optimizer takes all parameters of a model: those with two dimensions by Muon, and with `flatten`
    those with more, the others by AdamW. **Embeddings and the output head have two dimensions too and belong to AdamW:
    name them.**

        Muon([{"params": hidden}, {"params": [embedding, head], "use_muon": False}], lr=0.02, adamw_lr=3e-4)

    A group without "use_muon" is split in two by dimensions, so that `param_groups` and schedulers see both rates; its
    lr, weight_decay and eps are Muon's, the AdamW part takes the adamw_ ones. A group with use_muon=False gives AdamW's
    lr, betas, eps and weight_decay itself; what it leaves out are the adamw_ ones. A group with use_muon=None goes by
    dimensions and stays one: its AdamW part takes the adamw_ rates, and where a scheduler has set "initial_lr" and
    changes lr, its rate changes in proportion.

    Of DTensors (FSDP2, tensor parallelism) each matrix is gathered, a part of the model at a time, orthogonalized by
    every process, and each keeps its shard; experts that are sharded as a whole stay where they are. In
    `ZeroRedundancyOptimizer`, which wants the groups it gives, groups without "use_muon" have use_muon=None; the
    learning rate of a group with use_muon=False is the adamw_ one where the group's own is Muon's.

    Args:
        params, lr, weight_decay, momentum, nesterov: as in `torch.optim.Muon`.
        ns_coefficients, eps, ns_steps: of Newton-Schulz; eps is the smallest Frobenius norm that is divided by.
        adjust_lr_fn: None or "original": lr sqrt(max(1, rows / columns)); "match_rms_adamw" (Liu et al. 2025):
            0.2 lr sqrt(max(rows, columns)), with which AdamW's lr and weight_decay can be kept.
        flatten: of parameters with three or more dimensions, as in Microsoft's Dion; for all groups, or as an option of
            one. None: they go by AdamW. True: [out, ...] is a matrix of out rows, for convolutions. False:
            [..., rows, columns] is a batch of matrices, for experts. The adjustment is by the matrix's shape.
        adamw_lr, adamw_weight_decay, adamw_betas, adamw_eps: of AdamW groups; None: as Muon's.
        maximize, capturable: as in torch's other optimizers.
        own: max_grad_norm, noise, master_weights, stochastic_rounding, backend and torch's flags, as in
            `FusedOptimizer`.

    Raises:
        UsageError: a hyper-parameter outside its range, use_muon=True for a parameter that is no matrix, or clipping or
            noise in ZeroRedundancyOptimizer.
    """

    rule_options: ClassVar[tuple[str, ...]] = ("use_muon", "adjust_lr_fn", "flatten")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = newton_schulz.COEFFICIENTS,
        eps: float = newton_schulz.EPS,
        ns_steps: int = newton_schulz.STEPS,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool | None = None,
        adamw_lr: float | torch.Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **own: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "flatten": flatten,
            "use_muon": True,
            "betas": adamw_betas,
            "maximize": maximize,
            "capturable": capturable,
        }
        self._adamw: dict[str, Any] = {"eps": adamw_eps}
        if adamw_lr is not None:
            self._adamw["lr"] = adamw_lr
        if adamw_weight_decay is not None:
            self._adamw["weight_decay"] = adamw_weight_decay
        super().__init__(params, defaults, **own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that does not say "use_muon" becomes two where it holds matrices and other parameters."""
        before = len(self.param_groups)
        try:
            for part in self._parts(param_group):
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The groups that a group becomes, with the rates of AdamW where they hold parameters for it."""
        use = group.get("use_muon", ...)
        if zero.is_caller():
            if use is ... or use is None:
                return [{"use_muon": None, **self._mixed(), **group}]
            if use is False:  # ZeRO has filled in Muon's defaults, so that what was left out does not show otherwise
                group = {name: value for name, value in group.items() if not self._is_muons(name, value)}
        if use is None:
            return [{**self._mixed(), **group}]
        if use is not ...:
            return [group if use else {**self._adamw, **group}]
        flatten = group.get("flatten", self.defaults["flatten"])
        return [part if part["use_muon"] else {**part, **self._adamw} for part in _split(group, flatten)]

    def _mixed(self) -> dict[str, Any]:
        """The rates of AdamW under their own names, beside Muon's."""
        return {f"adamw_{name}": value for name, value in self._adamw.items()}

    def _is_muons(self, name: str, value: Any) -> bool:
        return name in self._adamw and value is self.defaults[name]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw": self._adamw}

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_hyper(group, "weight_decay")
        check_hyper(group, "eps")
        if not (group["use_muon"] is None or isinstance(group["use_muon"], bool)):
            raise UsageError(
                f"use_muon {group['use_muon']!r}: it is True (Muon), False (AdamW) or None (by dimensions)."
            )
        if not (group["flatten"] is None or isinstance(group["flatten"], bool)):
            raise UsageError(
                f"flatten {group['flatten']!r}: it is True (convolutions are matrices), False (a batch of matrices) or "
                "None (AdamW takes what has three or more dimensions)."
            )
        if not group["use_muon"]:
            check_betas(group["betas"])
            for name in ("adamw_lr", "adamw_eps", "adamw_weight_decay"):
                if group.get(name) is not None:
                    check_hyper(group, name)
        if group["use_muon"] is False:
            return
        check_hyper(group, "momentum")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise UsageError(f"adjust_lr_fn {group['adjust_lr_fn']!r} is not known. Use one of: {ADJUSTMENTS}.")
        if len(group["ns_coefficients"]) != 3:
            raise UsageError(
                f"ns_coefficients {group['ns_coefficients']}: there are three, as in (3.4445, -4.775, 2.0315)."
            )
        if not 0 <= group["ns_steps"] < 100:
            raise UsageError(f"ns_steps {group['ns_steps']}: it must be from 0 to 99. 5 is the usual number.")
        if group["use_muon"] is None:
            return
        for param in group["params"]:
            if not matrices.is_matrix(param.shape, group["flatten"]):
                more = "Set flatten (True for convolutions, False for experts). " if param.dim() > 2 else ""
                raise UsageError(
                    f"use_muon=True with a parameter of shape {tuple(param.shape)}: only matrices can be "
                    f"orthogonalized. {more}Leave use_muon out, and AdamW takes what has another number of dimensions."
                )

    @classmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        use, flatten = group["use_muon"], group["flatten"]
        if not (matrices.is_matrix(param.shape, flatten) if use is None else use):
            return ParamRule("AdamW", ("exp_avg", "exp_avg_sq"))
        factor = adjustment(group["adjust_lr_fn"], *matrices.size(param.shape, flatten))
        return ParamRule("MuonMomentum", ("momentum_buffer",), extra=(factor,), then="MuonMove", counts=False)

    @classmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        if rule.name == "AdamW":
            beta1, beta2 = group["betas"]
            own = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
            return own if group["use_muon"] is False else own | _of_mixed(group)
        if rule.name == "MuonMove":
            return {"weight_decay": group["weight_decay"], "adjustment": rule.extra[0]}
        return {"momentum": group["momentum"], "nesterov": group["nesterov"]}

    def _transform(self, staged: list[Whole]) -> None:
        matrices.transform(staged, _orthogonalize)


def _orthogonalize(staged: list[Whole]) -> None:
    """In place, all matrices of one shape in memory and of equal options at once."""
    alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
    copies = []
    for tensor, _, group in staged:
        memory = tensor.mT if tensor.dim() == 2 and not tensor.is_contiguous() else tensor  # it does not care which
        if not memory.is_contiguous():  # as of channels_last
            memory = memory.contiguous()
            copies.append((tensor, memory))
        options = (tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])
        for matrix in matrices.views(memory, group["flatten"]):
            alike[(matrix.shape, options)].append(matrix)
    for (_, (coefficients, steps, eps)), found in alike.items():
        newton_schulz.orthogonalize(found, coefficients, steps, eps)
    for tensor, memory in copies:
        tensor.copy_(memory)


def adjustment(name: str | None, rows: int, columns: int) -> float:
    """Factor of the learning rate of a matrix; names as in `torch.optim.Muon`'s adjust_lr_fn."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if columns else 1.0


def _of_mixed(group: dict[str, Any]) -> dict[str, Any]:
    """What AdamW's part of a group has otherwise than Muon's; its rate follows the group's in proportion."""
    given = {name: group.get(f"adamw_{name}") for name in ("lr", "eps", "weight_decay")}
    own = {name: value for name, value in given.items() if value is not None}
    first = group.get("initial_lr")
    if "lr" in own and first is not None and (is_device_scalar(first) or float(first)):
        own["lr"] = own["lr"] * (group["lr"] / first)
    return own


def _split(group: dict[str, Any], flatten: bool | None) -> list[dict[str, Any]]:
    """The matrices of a group that does not say which it holds, and its other parameters."""
    params = group["params"]
    if isinstance(params, set):  # torch refuses it
        return [{"use_muon": True, **group}]
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    named = [entry[1] if isinstance(entry, tuple) else entry for entry in params]  # as named_parameters() gives them
    fit = [isinstance(param, torch.Tensor) and matrices.is_matrix(param.shape, flatten) for param in named]
    split = {use: [entry for entry, fits in zip(params, fit, strict=True) if fits is use] for use in (True, False)}
    return [{**group, "params": part, "use_muon": use} for use, part in split.items() if part or (use and not params)]
