"""The parameters of an optimizer as the lists that a pass runs over, and whether these still stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pybatch import ops
from pybatch.errors import UsageError
from pybatch.optim import masters, sharding
from pybatch.optim.arguments import check_capturable
from pybatch.optim.hyper import Groups, HyperOf, HyperRows
from pybatch.optim.options import Options, Rule
from pybatch.optim.slots import Slot, check_param, conform, fit_state

State = dict[Any, dict[str, Any]]
RuleOf = Callable[[dict[str, Any], torch.Tensor], Rule]
_DTYPES = [torch.zeros(1, dtype=dtype) for dtype in sorted(ops.DTYPES, key=ops.DTYPES.__getitem__)]


@dataclass(frozen=True)
class Gradients:
    """The gradients of a moment, by slot.

    Attributes:
        addresses: 0 where there is none, 1 where it has no elements.
        codes: their dtypes, as in ops.DTYPES.
        count: how many there are.
        copies: those that had to be copied into their parameter's layout; keeps them alive.
    """

    addresses: NDArray[np.int64]
    codes: NDArray[np.int64]
    count: int
    copies: dict[int, torch.Tensor]


class Staged(NamedTuple):
    """A parameter that two passes update: the first writes `tensor`, which the optimizer transforms."""

    slot: int
    tensor: torch.Tensor
    group: int


class Tables:
    """The parameters that have had a gradient or have a state, as lists.

    Args:
        groups, state: torch's `param_groups` and `optimizer.state`; states that are missing are made.
        options: the optimizer's.
        rule_of: rule of a parameter.
        ledger: the optimizer's scalars; None: not made yet.
        previous: the tables before, whose parameters stay in the list.
        layers: saved noise statistics per parameter, by index; float64 [ops.LAYER_SIZE] each.

    Raises:
        UsageError: a parameter that no backend can update, before anything was written.
    """

    def __init__(
        self,
        groups: Groups,
        state: State,
        options: Options,
        rule_of: RuleOf,
        ledger: ops.Ledger | None,
        previous: Tables | None,
        layers: Mapping[int, torch.Tensor],
    ) -> None:
        known = set(previous.params) if previous is not None else set()
        numbers: list[int] = []
        found: list[tuple[int, torch.Tensor]] = []
        self.others: list[torch.Tensor] = []  # parameters without gradient or state so far
        index = 0
        device: torch.device | None = None
        for number, group in enumerate(groups):
            for param in group["params"]:
                if param.grad is not None or param in known or bool(state.get(param)):
                    check_param(index, param, device)
                    device = param.device
                    found.append((index, param))
                    numbers.append(number)
                else:
                    self.others.append(param)
                index += 1
        if device is not None:
            check_capturable(groups, device)
        self.backend = ops.choose_backend(options.backend, device) if device is not None else None
        self.slots = [Slot.of(index, param) for index, param in found]
        self.params: list[torch.Tensor] = [slot.param for slot in self.slots]
        self.group_of = numbers
        self.copied = [slot for slot in self.slots if slot.copy is not None]
        self.processes = sharding.processes(self.params)
        self.ledger = ledger
        self.staged: list[Staged] = []
        self.first: ops.TensorList | None
        self.second: ops.TensorList | None
        self.masters: dict[int, tuple[str, torch.Tensor]] = {}  # by slot
        self._rows, self._more_rows = HyperRows(), HyperRows()
        self._parts: dict[bytes, ops.TensorList] = {}
        if device is None:
            self.first = self.second = None
        else:
            self._make_lists(groups, state, options, rule_of, device, previous, layers)
        self._sharded = any(slot.sharded for slot in self.slots)
        self._memory = [slot.memory for slot in self.slots]
        # Written by others: torch counts it. Only masters and norms carried from step to step depend on it.
        self._versioned = bool(self.masters) or (self.first is not None and self.first.row_norms)
        self._versions = np.zeros(len(self.slots), dtype=np.int64)
        ops.Watch.versions(self.params, self._versions)
        self._watch = ops.Watch([group["params"] for group in groups], self._memory, self.others, state)

    def _make_lists(
        self,
        groups: Groups,
        state: State,
        options: Options,
        rule_of: RuleOf,
        device: torch.device,
        previous: Tables | None,
        layers: Mapping[int, torch.Tensor],
    ) -> None:
        assert self.backend is not None
        rules = [rule_of(groups[number], slot.param) for number, slot in zip(self.group_of, self.slots, strict=True)]
        steps = [_steps_so_far(state.get(slot.param, {})) for slot in self.slots]
        kept = [self._fit_states(i, slot, rules[i], state, options) for i, slot in enumerate(self.slots)]
        if self.ledger is None:
            self.ledger = ops.Ledger(device)
        self.ledger.to(device)
        entries, more = [], []
        for i, (slot, rule, number) in enumerate(zip(self.slots, rules, self.group_of, strict=True)):
            own = state[slot.param] if kept[i] else {}
            states = tuple(sharding.local(own[name]) for name in rule.states)
            step = steps[i]
            share = 1.0 if self.processes is None else self.processes.share(slot.param)
            stored = masters.storage(slot, options)[0]
            master = self.masters[i][1] if i in self.masters else None
            if rule.then is None:
                row = self._rows.row(number, rule)
                entries.append(ops.Entry(slot.dense, states, rule.name, row, step, stored, master, slot.index, share))
                continue
            if self.processes is not None and slot.sharded and slot.shape != slot.param.shape:
                raise UsageError(
                    f"{slot.what} is sharded, and {rule.then} needs the whole of it. Replicate it, or give it to "
                    "another rule."
                )
            staging = torch.empty_like(slot.dense, dtype=torch.bfloat16)
            self.staged.append(Staged(i, staging, number))
            entries.append(ops.Entry(staging, states, rule.name, self._rows.row(number, rule), step, share=share))
            then = Rule(rule.then, extra=rule.extra)
            row = self._more_rows.row(number, then)
            more.append(ops.Entry(slot.dense, (), then.name, row, step, stored, master, slot.index, share))
        kept_layers = self._make_layers(device, layers) if options.noise else None
        self.first = ops.TensorList(entries, len(self._rows.of), self.ledger, self.backend, kept_layers)
        if previous is not None and previous.first is not None:
            self._take_over(self.first, previous.first, previous.params)
        self.second = None
        if more:
            self.second = ops.TensorList(more, len(self._more_rows.of), self.ledger, self.backend)
            self.second.set("grad_type", [ops.DTYPES[torch.bfloat16]] * len(more))
        for step, slot, counted in zip(self.first.steps, self.slots, kept, strict=True):
            if counted:
                state[slot.param]["step"] = step

    def _fit_states(self, i: int, slot: Slot, rule: Rule, state: State, options: Options) -> bool:
        """Make the parameter's states fit; whether it has any. A stochastic rounding counts its steps."""
        stored, extra = masters.storage(slot, options)
        if not rule.states and extra is None and not stored.endswith("_stochastic"):
            return False
        own = state[slot.param]
        for name in rule.states:
            own[name] = self._placed(slot, own.get(name), fit_state(slot, name, own.get(name)))
        if extra is not None:
            master = masters.fit_master(slot, extra, own.get(extra))
            own[extra] = self._placed(slot, own.get(extra), master)
            self.masters[i] = (extra, master)
        return True

    @staticmethod
    def _placed(slot: Slot, saved: torch.Tensor | None, fitted: torch.Tensor) -> torch.Tensor:
        """The state as the user sees it: sharded as its parameter."""
        if not slot.sharded:
            return fitted
        if saved is not None and sharding.is_sharded(saved) and sharding.local(saved) is fitted:
            return saved
        return sharding.like(slot.param, fitted)

    def _make_layers(self, device: torch.device, saved: Mapping[int, torch.Tensor]) -> torch.Tensor:
        made = torch.zeros(len(self.slots), ops.LAYER_SIZE, dtype=torch.float64, device=device)
        for row, slot in zip(made, self.slots, strict=True):
            if slot.index in saved:
                row.copy_(saved[slot.index])
        return made

    def _take_over(self, new: ops.TensorList, old: ops.TensorList, params: Sequence[torch.Tensor]) -> None:
        """Norms and noise statistics of parameters that were in the list before."""
        places = {param: i for i, param in enumerate(params)}
        both = [(i, places[param]) for i, param in enumerate(self.params) if param in places]
        to, of = [i for i, _ in both], [i for _, i in both]
        new.norms[to] = old.norms[of].to(new.device)
        if new.layers is not None and old.layers is not None:
            new.layers[to] = old.layers[of].to(new.device)

    def layers(self) -> dict[int, torch.Tensor]:
        """Noise statistics by index of parameter, float64 [ops.LAYER_SIZE] each; empty without noise=True."""
        if self.first is None or self.first.layers is None:
            return {}
        return {slot.index: row for slot, row in zip(self.slots, self.first.layers, strict=True)}

    def stands(self, groups: Groups, state: State) -> bool:
        """Whether nothing was replaced, resized, moved or cast since, and no other parameter has got a gradient."""
        if self._sharded:
            self._memory = [slot.memory for slot in self.slots]
        lists = [group["params"] for group in groups]
        return bool(self._watch.stands(lists, self._memory, state))

    def _follow_writes(self) -> None:
        """Bring up to date what was derived from parameters that others have written in place since."""
        if not self._versioned:
            return
        assert self.first is not None
        changed = ops.Watch.versions(self.params, self._versions)
        for i in changed:
            if i in self.masters:
                masters.refresh(self.slots[i], *self.masters[i])
        self.first.forget(changed)

    def _written(self, sources: NDArray[np.int64]) -> None:
        """Count the pass's own write, so that autograd refuses a graph that saved the parameters as they were."""
        updated = self.params if sources.all() else [self.params[i] for i in np.flatnonzero(sources)]
        torch.autograd.graph.increment_version(updated)
        if self._versioned:
            ops.Watch.versions(self.params, self._versions)

    def send_hyper(self, groups: Groups, hyper_of: HyperOf) -> None:
        """Bring the hyper-parameters of both lists up to date."""
        assert self.first is not None
        self._rows.send(self.first, groups, hyper_of, maximize=True)
        if self.second is not None:
            self._more_rows.send(self.second, groups, hyper_of, maximize=False)  # the first pass has applied it

    def gradients(self) -> Gradients:
        """The parameters' gradients as the pass reads them; raises UsageError for one that it can't."""
        addresses, codes = (np.zeros(len(self.slots), dtype=np.int64) for _ in range(2))
        bad, count = self._watch.gradients(self.params, _DTYPES, addresses, codes)
        copies: dict[int, torch.Tensor] = {}
        if bad >= 0:
            for i, slot in enumerate(self.slots):
                if slot.param.grad is not None and addresses[i] == 0:
                    copies[i] = conform(slot, slot.param.grad)
                    addresses[i], codes[i] = copies[i].data_ptr() or 1, ops.DTYPES[copies[i].dtype]
        return Gradients(addresses, codes, count, copies)

    def run(
        self,
        call: Any,
        follow: Any,
        sources: NDArray[np.int64],
        transform: Callable[[list[torch.Tensor], Groups], None],
        groups: Groups,
    ) -> None:
        """One update.

        Args:
            call, follow: scalars of the pass over all parameters, and of the second one over staged ones.
            sources: what the pass reads, by slot; 0: nothing for this one.
            transform: the optimizer's, between the two passes.
            groups: torch's `param_groups`.
        """
        assert self.first is not None
        assert self.backend is not None
        for slot in self.copied:
            slot.dense.copy_(sharding.local(slot.param))
        self._follow_writes()
        reduce = None if self.processes is None else self.processes.reduce
        self.backend.step(self.first, call, reduce)
        if self.second is not None:
            here = [staged for staged in self.staged if sources[staged.slot]]
            self.second.set("grad", [staged.tensor.data_ptr() if sources[staged.slot] else 0 for staged in self.staged])
            if here:
                transform([staged.tensor for staged in here], [groups[staged.group] for staged in here])
                self.backend.step(self.second, follow)
        for slot in self.copied:
            sharding.local(slot.param).copy_(slot.dense)
        self._written(sources)

    def part(self, rows: NDArray[np.int64]) -> ops.TensorList:
        """A list of some of the slots, for accumulation only; it has a ledger of its own."""
        assert self.first is not None
        assert self.backend is not None
        key = rows.tobytes()
        if key not in self._parts:
            slots: Sequence[Slot] = [self.slots[i] for i in rows]
            shares = [1.0 if self.processes is None else self.processes.share(slot.param) for slot in slots]
            entries = [
                ops.Entry(slot.dense, (), "Sgd", 0, 0.0, share=share) for slot, share in zip(slots, shares, strict=True)
            ]
            layers = self.first.layers
            own = (
                None
                if layers is None
                else torch.zeros(len(slots), ops.LAYER_SIZE, dtype=layers.dtype, device=layers.device)
            )
            self._parts[key] = ops.TensorList(entries, 1, ops.Ledger(self.first.device), self.backend, own)
        return self._parts[key]


def _steps_so_far(own: Mapping[str, Any]) -> torch.Tensor | float:
    """Updates a parameter has had; the twin of a rule with momentum alone does not count them, and has had one."""
    counted: torch.Tensor | float | None = own.get("step")
    if counted is not None:
        return counted
    return 1.0 if own.get("momentum_buffer") is not None else 0.0
