"""From parameters and their states to the lists that a pass runs over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from pybatch import ops
from pybatch.optim._engine import masters, sharding, states
from pybatch.optim._engine.arguments import check_capturable
from pybatch.optim._engine.hyper import Groups, HyperRows
from pybatch.optim._engine.options import Options, ParamRule
from pybatch.optim._engine.slots import Slot, check_param

State = dict[Any, dict[str, Any]]
RuleOf = Callable[[dict[str, Any], torch.Tensor], ParamRule]


class Staged(NamedTuple):
    """A parameter that two passes update: the first writes `tensor`, which the optimizer transforms."""

    slot: int
    tensor: torch.Tensor
    group: int


class ActiveParams(NamedTuple):
    """The parameters of an optimizer: those to list, the numbers of their groups, and those without anything yet."""

    slots: list[Slot]
    numbers: list[int]
    others: list[torch.Tensor]


def active_params(groups: Groups, state: State, known: set[torch.Tensor]) -> ActiveParams:
    """List the parameters that have a gradient or a state, or are known.

    Raises:
        UsageError: one of them can't be updated by any backend, or is on another device than the first.
    """
    active: list[tuple[int, torch.Tensor]] = []
    numbers, others, index = [], [], 0
    for number, group in enumerate(groups):
        for param in group["params"]:
            if param.grad is not None or param in known or bool(state.get(param)):
                check_param(index, param, active[0][1].device if active else None)
                active.append((index, param))
                numbers.append(number)
            else:
                others.append(param)
            index += 1
    if active:
        check_capturable(groups, active[0][1].device)
    return ActiveParams([Slot.of(index, param) for index, param in active], numbers, others)


class PassLists:
    """The lists of an optimizer, with states made or brought into the layout of their parameters.

    Args:
        active: at least one slot.
        groups, state: torch's `param_groups` and `optimizer.state`.
        options: the optimizer's.
        rule_of: rule of a parameter.
        processes: that hold shards of the parameters; None: there is only this one.
        ledger: the optimizer's scalars; None: made here.
        layers: saved noise statistics per parameter, by index; float64 [ops.LAYER_SIZE] each.

    Raises:
        UsageError: a parameter that can't be stored or updated as asked, before anything was written.
    """

    def __init__(
        self,
        active: ActiveParams,
        groups: Groups,
        state: State,
        options: Options,
        rule_of: RuleOf,
        processes: sharding.Processes | None,
        ledger: ops.Ledger | None,
        layers: Mapping[int, torch.Tensor],
    ) -> None:
        device = active.slots[0].device
        self.backend, kind = ops.choose_backend(options.backend, device), options.state_dtype
        self.masters: dict[int, tuple[str, torch.Tensor]] = {}  # by slot
        self.staged: list[Staged] = []
        self.rows, self.more_rows = HyperRows(), HyperRows()
        rules = [rule_of(groups[number], slot.param) for number, slot in zip(active.numbers, active.slots, strict=True)]
        stored = [masters.storage(slot, options) for slot in active.slots]
        self.ledger = ledger or ops.Ledger(device)
        self.ledger.to(device)
        entries, more, counted = [], [], []
        for i, (slot, rule, number) in enumerate(zip(active.slots, rules, active.numbers, strict=True)):
            storage, extra = stored[i]
            # A stateless rule counts its steps only for the random bits.
            keeps = bool(rule.states or extra or storage.endswith("_stochastic"))
            own = state[slot.param] if keeps else {}
            step = steps_so_far(own)
            kept_states = [self._fit(slot, own, rule, name, kind) for name in rule.states]
            scales = tuple(kept.scales for kept in kept_states if kept.scales is not None)
            if extra is not None:
                master = masters.fit_master(slot, extra, own)
                own[extra] = placed(slot, own.get(extra), master)
                self.masters[i] = (extra, master)
            masters.drop_others(extra, own)
            scalar = None if rule.scalar is None else own.get(rule.scalar)
            share = 1.0 if processes is None else processes.share(slot.param)
            target, name, row = slot.dense, rule.name, self.rows.row(number, rule)
            kept = self.masters[i][1] if extra else None
            if rule.then is not None:
                staging = torch.empty_like(slot.dense, dtype=torch.bfloat16)
                self.staged.append(Staged(i, staging, number))
                then = self.more_rows.row(number, ParamRule(rule.then, extra=rule.extra))
                more.append(ops.Entry(target, (), rule.then, then, step, storage, kept, slot.index, share))
                target, storage, kept = staging, "bfloat16", None
            of_rule = tuple(state.state for state in kept_states)
            entries.append(
                ops.Entry(target, of_rule, name, row, step, storage, kept, slot.index, share, scalar, scales)
            )
            counted.append((own if keeps else None, rule.scalar, rule.counts or options.random))
        statistics = saved_layers(active.slots, layers, device) if options.noise else None
        self.first = ops.TensorList(entries, len(self.rows.of), self.ledger, self.backend.chunk, statistics, kind)
        self.second: ops.TensorList | None = None
        if more:
            self.second = ops.TensorList(more, len(self.more_rows.of), self.ledger, self.backend.chunk)
            self.second.set("grad_type", [ops.DTYPES[torch.bfloat16]] * len(more))
        for step, scalar, (own_state, named, counts) in zip(self.first.steps, self.first.scalars, counted, strict=True):
            if own_state is not None and counts:
                own_state["step"] = step
            if own_state is not None and named is not None:
                own_state[named] = scalar

    @staticmethod
    def _fit(slot: Slot, own: dict[str, Any], rule: ParamRule, name: str, kind: str) -> states.Kept:
        fitted = states.fit(slot, own, rule, name, kind)
        own[name] = placed(slot, own.get(name), fitted.state)
        if fitted.scales is not None:
            own[name + states.SCALE] = fitted.scales
        return fitted


def placed(slot: Slot, saved: torch.Tensor | None, fitted: torch.Tensor) -> torch.Tensor:
    """A state as the user sees it: sharded as its parameter."""
    if not slot.sharded:
        return fitted
    if saved is not None and sharding.is_sharded(saved) and sharding.local(saved) is fitted:
        return saved
    return sharding.like(slot.param, fitted)


def saved_layers(slots: list[Slot], saved: Mapping[int, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Noise statistics by slot, float64 [slots, ops.LAYER_SIZE]; 0 where nothing was saved."""
    made = torch.zeros(len(slots), ops.LAYER_SIZE, dtype=torch.float64, device=device)
    for row, slot in zip(made, slots, strict=True):
        if slot.index in saved:
            row.copy_(saved[slot.index])
    return made


def steps_so_far(own: Mapping[str, Any]) -> torch.Tensor | float:
    """Updates a parameter has had; the twin of a rule with momentum alone does not count them, and has had one."""
    counted: torch.Tensor | float | None = own.get("step")
    if counted is not None:
        return counted
    return 1.0 if own.get("momentum_buffer") is not None else 0.0
