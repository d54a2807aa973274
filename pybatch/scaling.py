"""Learning-rate rules: what becomes of a parameter group when the batch size changes. No torch here.

A rule is a function of the group tuned at a base batch and of the batch asked for; it returns the whole group, because
some rules change more than the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pybatch.base.errors import UsageError, unknown

# Goyal et al. (2017) warm up for 5 of their 90 epochs; the same share of the examples a base run takes is kept here.
WARMUP_SHARE = 5 / 90


@dataclass(frozen=True)
class Base:
    """The run a rule starts from: its batch size, and how many steps it took where that is known."""

    batch: int
    steps: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"base batch {self.batch} is below 1. A batch has at least one example.")


@dataclass(frozen=True)
class Scaled:
    """A parameter group for one batch size, with its schedule.

    The rate rises linearly from `warmup_from` to the group's `lr` over the first `warmup_steps` steps. Where
    `gain_batch` is set, each step's rate is multiplied by the AdaScale gain of the batch over micro-batches of that
    size, measured as the run goes.
    """

    group: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    warmup_from: float = 0.0
    gain_batch: int | None = None

    def lr(self, step: int) -> float:
        """The rate of a step, counted from 0, without the gain."""
        lr = float(self.group["lr"])
        if step >= self.warmup_steps:
            return lr
        return self.warmup_from + (lr - self.warmup_from) * (step + 1) / self.warmup_steps


RateRule = Callable[[Mapping[str, Any], int, Base], Scaled]

_rules: dict[str, RateRule] = {}
SEARCHED = "tuned"  # the rule whose rate is sought at every batch size
LOGGED = "as logged"  # of runs that a user made, at whatever rates


def register(name: str) -> Callable[[RateRule], RateRule]:
    """Function decorator: make a rule known under this name."""

    def keep(rule: RateRule) -> RateRule:
        _rules[name] = rule
        return rule

    return keep


def rules() -> dict[str, RateRule]:
    """The rules by name."""
    return dict(_rules)


def scale(rule: str, group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """The group `rule` gives for `batch`, from a group tuned at `base.batch`.

    Args:
        rule: one of `rules()`.
        group: a parameter group's hyper-parameters, "lr" among them; it is not changed.
        batch: batch size in examples.
        base: the run the group was tuned for.

    Raises:
        UsageError: no such rule, a group without a rate, or a batch the rule has no answer for.
    """
    if rule not in _rules:
        raise unknown("rule", rule, _rules)
    if batch < 1:
        raise UsageError(f"batch {batch} is below 1. A batch has at least one example.")
    lr = group.get("lr")
    if lr is None or not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"rule {rule!r}: the group's lr is {lr}. Give a finite rate above 0.")
    return _rules[rule](group, batch, base)


@register("constant")
def constant(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """The same rate at every batch size."""
    return Scaled(dict(group))


@register("linear")
def linear(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """Rate times B / B_0, after a warm-up from the base rate (Goyal et al. 2017, section 2.2)."""
    lr = group["lr"]
    warmup = 0
    if batch > base.batch and base.steps is not None:
        warmup = math.ceil(WARMUP_SHARE * base.steps * base.batch / batch)
    return Scaled({**group, "lr": lr * batch / base.batch}, warmup, lr)


@register("sqrt")
def sqrt(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """Rate times sqrt(B / B_0) (Krizhevsky 2014; Hoffer et al. 2017)."""
    return Scaled({**group, "lr": group["lr"] * math.sqrt(batch / base.batch)})


@register(SEARCHED)
def tuned(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """The rate itself, one of those a search tries at every batch size (Shallue et al. 2019)."""
    return Scaled(dict(group))


@register("adascale")
def adascale(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """Rate times the measured gain of B over B_0, between 1 and B / B_0 (Johnson et al. 2020, section 3)."""
    if batch % base.batch:
        raise UsageError(
            f"batch {batch}: rule 'adascale' compares gradients of the base batch {base.batch}, of which this is no "
            "multiple. Leave this batch or rule out, or take another base batch."
        )
    return Scaled(dict(group), gain_batch=base.batch if batch > base.batch else None)


@register("adam-sde")
def adam_sde(group: Mapping[str, Any], batch: int, base: Base) -> Scaled:
    """With k = B / B_0: rate sqrt(k), 1 - beta times k, eps / sqrt(k) (Malladi et al. 2022, definition 5.2)."""
    k = batch / base.batch
    if "betas" not in group or "eps" not in group:
        raise UsageError("rule 'adam-sde': the optimizer has no betas and eps. Use it with adam or adamw.")
    betas = tuple(1 - k * (1 - beta) for beta in group["betas"])
    if min(betas) < 0:
        most = math.floor(base.batch / (1 - min(group["betas"])))
        raise UsageError(
            f"batch {batch}: rule 'adam-sde' ends at batch {most}, above which a beta of {tuple(group['betas'])} would "
            "be negative. Leave larger batches out, or take a larger base batch."
        )
    return Scaled({**group, "lr": group["lr"] * math.sqrt(k), "betas": betas, "eps": group["eps"] / math.sqrt(k)})


FOLLOWING = {  # what may follow the batch beside the rate, by name: how, and the argument it needs
    "beta2": {"constant": "as it is", "half-life": "the same half-life in examples"},
    "decay": {
        "constant": "as it is",
        "linear": "in proportion to the batch",
        "timescale": "in proportion to the batch over the rate",
    },
}


def followed(
    group: Mapping[str, Any],
    batch: int,
    base: int,
    beta2: str = "constant",
    decay: str = "constant",
    *,
    rate: float = 1.0,
) -> dict[str, Any]:
    """A group whose second beta and weight decay follow the batch size, as rules of their own beside the rate's.

    Args:
        group: as tuned, or given, at the base batch.
        batch, base: examples.
        beta2: "constant", or "half-life": beta2^(B / B_0), which forgets after as many examples at every batch size
            (Marek et al. 2025, "Small Batch Size Training for Language Models", section 3.2).
        decay: "constant"; "linear": times B / B_0 (Bergsma et al. 2025, "Power Lines", arXiv 2505.13738: the best decay
            is linear in the batch for a fixed model and number of tokens); or "timescale": times (B / B_0) / rate,
            which keeps the examples B / (rate x decay) over which AdamW averages its updates, best kept constant in
            epochs (Wang and Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset size",
            arXiv 2405.13698: 1 / (rate x decay) iterations of B of them). Both are one at a constant rate.
        rate: the learning rate at this batch over that at the base batch.

    Raises:
        UsageError: no such rule, or the group has nothing for it to act on.
    """
    for name, rule in (("beta2", beta2), ("decay", decay)):
        if rule not in FOLLOWING[name]:
            raise unknown(f"{name} rule", rule, FOLLOWING[name])
    found = dict(group)
    if beta2 != "constant":
        if len(betas := tuple(group.get("betas", ()))) < 2:
            raise UsageError(f"beta2 rule {beta2!r}: the optimizer has no second beta. Leave it out, or take adamw.")
        found["betas"] = (betas[0], betas[1] ** (batch / base), *betas[2:])
    if decay != "constant":
        if not group.get("weight_decay"):
            raise UsageError(
                f"decay rule {decay!r}: the optimizer has no weight decay to scale. Give one, 'adamw:weight_decay=0.1'."
            )
        found["weight_decay"] = group["weight_decay"] * batch / base / (rate if decay == "timescale" else 1)
    return found


def gain(trace: float, grad_sq: float, ratio: float) -> float:
    """AdaScale's gain (sigma^2 + mu^2) / (sigma^2 / S + mu^2) (Johnson et al. 2020, equation 4).

    Args:
        trace: sigma^2, the variance of a base batch's gradient, summed over its elements.
        grad_sq: mu^2, the squared norm of the true gradient.
        ratio: S, the batch size in base batches.
    """
    # The paper's floors: an unlucky pair of estimates must not make a gain outside 1 .. S.
    sigma, mu = max(trace, 1e-6), max(grad_sq, 0.0)
    return (sigma + mu) / (sigma / ratio + mu)
