"""The lists of an optimizer as one step sees them: whether they still stand, the gradients, one update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pybatch import ops
from pybatch.optim._engine import masters, sharding
from pybatch.optim._engine.hyper import Groups, HyperOf
from pybatch.optim._engine.lists import ActiveParams, PassLists, RuleOf, State, active_params
from pybatch.optim._engine.matrices import Whole
from pybatch.optim._engine.options import Options
from pybatch.optim._engine.slots import Slot, conform

_DTYPES = [torch.zeros(1, dtype=dtype) for dtype in sorted(ops.DTYPES, key=ops.DTYPES.__getitem__)]

# Tables of parts kept: backward() mostly gives the same buckets in every step, but a model whose graph depends on its
# data (experts, dropped layers) gives ever new ones.
MAX_PARTS = 64


class Gradients(NamedTuple):
    """The gradients of a moment, by slot.

    Attributes:
        addresses: 0 where there is none, 1 where it has no elements.
        codes: their dtypes, as in ops.DTYPES.
        present: how many there are.
        copies: those that had to be copied into their parameter's layout; keeps them alive.
    """

    addresses: NDArray[np.int64]
    codes: NDArray[np.int64]
    present: int
    copies: dict[int, torch.Tensor]


class Tables:
    """The parameters that have had a gradient or have a state, as lists; `make` says whether there are any.

    Args:
        active: at least one slot.
        lists: of these slots.
        processes: that hold shards of the parameters; None: there is only this one.
        groups, state: torch's `param_groups` and `optimizer.state`.
    """

    def __init__(
        self, active: ActiveParams, lists: PassLists, processes: sharding.Processes | None, groups: Groups, state: State
    ) -> None:
        self.slots, self.backend, self.ledger = active.slots, lists.backend, lists.ledger
        self.first, self.second, self._lists, self._processes = lists.first, lists.second, lists, processes
        self.params: list[torch.Tensor] = [slot.param for slot in self.slots]
        self._copied = [slot for slot in self.slots if slot.copy is not None]
        self._sharded = any(slot.sharded for slot in self.slots)
        self._memory = [slot.memory for slot in self.slots]
        self._parts: dict[bytes, ops.TensorList] = {}
        # torch counts writes in place. Only masters and norms carried from step to step depend on others' writes.
        self._versioned = bool(lists.masters) or self.first.row_norms
        self._versions = np.zeros(len(self.slots), dtype=np.int64)
        ops.Snapshot.versions(self.params, self._versions)
        self._snapshot = ops.Snapshot([group["params"] for group in groups], self._memory, active.others, state)

    @staticmethod
    def make(
        groups: Groups,
        state: State,
        options: Options,
        rule_of: RuleOf,
        ledger: ops.Ledger | None,
        previous: Tables | None,
        layers: Mapping[int, torch.Tensor],
    ) -> Tables | None:
        """Tables of the parameters as they are now; None before the first gradient.

        Args:
            groups, state: torch's `param_groups` and `optimizer.state`; states that are missing are made.
            options: the optimizer's.
            rule_of: rule of a parameter.
            ledger: the optimizer's scalars; None: not made yet.
            previous: the tables before, whose parameters stay in the list.
            layers: saved noise statistics per parameter, by index; float64 [ops.LAYER_SIZE] each.

        Raises:
            UsageError: a parameter that can't be updated as asked, before anything was written.
        """
        active = active_params(groups, state, set() if previous is None else set(previous.params))
        if not active.slots:
            return None
        if previous is not None:
            previous._drop_remainders()
        processes = sharding.processes([slot.param for slot in active.slots])
        lists = PassLists(active, groups, state, options, rule_of, processes, ledger, layers)
        tables = Tables(active, lists, processes, groups, state)
        if previous is not None:
            tables._take_over(previous)
        return tables

    def _drop_remainders(self) -> None:
        """A remainder does not show by itself that others have written its parameter, as a master does."""
        for i in ops.Snapshot.versions(self.params, self._versions):
            if i in self._lists.masters and self._lists.masters[i][0] == "remainder":
                self._lists.masters[i][1].zero_()

    def _take_over(self, previous: Tables) -> None:
        """Norms and noise statistics of parameters that were in the list before."""
        places = {param: i for i, param in enumerate(previous.params)}
        both = [(i, places[param]) for i, param in enumerate(self.params) if param in places]
        to, of = [i for i, _ in both], [i for _, i in both]
        new, old = self.first, previous.first
        new.norms[to] = old.norms[of].to(new.device)
        if new.layers is not None and old.layers is not None:
            new.layers[to] = old.layers[of].to(new.device)

    def layers(self) -> dict[int, torch.Tensor]:
        """Noise statistics by index of parameter, float64 [ops.LAYER_SIZE] each; empty without noise=True."""
        if self.first.layers is None:
            return {}
        return {slot.index: row for slot, row in zip(self.slots, self.first.layers, strict=True)}

    def stands(self, groups: Groups, state: State) -> bool:
        """Whether nothing was replaced, resized, moved or cast since, and no other parameter has got a gradient."""
        if self._sharded:
            self._memory = [slot.memory for slot in self.slots]
        return bool(self._snapshot.stands([group["params"] for group in groups], self._memory, state))

    def send_hyper(self, groups: Groups, hyper_of: HyperOf) -> None:
        """Bring the hyper-parameters of both lists up to date."""
        self._lists.rows.send(self.first, groups, hyper_of, maximize=True)
        if self.second is not None:
            self._lists.more_rows.send(self.second, groups, hyper_of, maximize=False)  # the first pass has applied it

    def gradients(self) -> Gradients:
        """The parameters' gradients as the pass reads them; raises UsageError for one that it can't."""
        addresses, codes = (np.zeros(len(self.slots), dtype=np.int64) for _ in range(2))
        bad, count = self._snapshot.gradients(self.params, _DTYPES, addresses, codes)
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
        transform: Callable[[list[Whole]], None],
        groups: Groups,
    ) -> None:
        """One update.

        Args:
            call, follow: scalars of the pass over all parameters, and of the second one over staged ones.
            sources: what the pass reads, by slot; 0: nothing for this one.
            transform: the optimizer's, between the two passes.
            groups: torch's `param_groups`.
        """
        for slot in self._copied:
            slot.dense.copy_(sharding.local(slot.param))
        self._follow_writes()
        reduce = None if self._processes is None else self._processes.reduce
        self.backend.step(self.first, call, reduce)
        if self.second is not None:
            here = [staged for staged in self._lists.staged if sources[staged.slot]]
            self.second.set(
                "grad", [staged.tensor.data_ptr() if sources[staged.slot] else 0 for staged in self._lists.staged]
            )
            if here:
                transform([Whole(staged.tensor, self.params[staged.slot], groups[staged.group]) for staged in here])
                self.backend.step(self.second, follow)
        for slot in self._copied:
            sharding.local(slot.param).copy_(slot.dense)
        self._written(sources)

    def _follow_writes(self) -> None:
        """Bring up to date what was derived from parameters that others have written in place since."""
        if not self._versioned:
            return
        changed = ops.Snapshot.versions(self.params, self._versions)
        for i in changed:
            if i in self._lists.masters:
                masters.refresh(self.slots[i], *self._lists.masters[i])
        self.first.forget(changed)

    def _written(self, sources: NDArray[np.int64]) -> None:
        """Count the pass's own write, so that autograd refuses a graph that saved the parameters as they were."""
        every = np.count_nonzero(sources) == len(sources)
        updated = self.params if every else [self.params[i] for i in np.flatnonzero(sources)]
        torch.autograd.graph.increment_version(updated)
        if self._versioned:
            ops.Snapshot.versions(self.params, self._versions)

    def part(self, rows: NDArray[np.int64]) -> ops.TensorList:
        """A list of some of the slots, for accumulation only; it has a ledger of its own."""
        key = rows.tobytes()
        if key not in self._parts:
            if len(self._parts) == MAX_PARTS:
                self._parts.pop(next(iter(self._parts)))  # the oldest
            slots: Sequence[Slot] = [self.slots[i] for i in rows]
            shares = [1.0 if self._processes is None else self._processes.share(slot.param) for slot in slots]
            entries = [
                ops.Entry(slot.dense, (), "Sgd", 0, 0.0, share=share) for slot, share in zip(slots, shares, strict=True)
            ]
            layers = self.first.layers
            own = (
                None
                if layers is None
                else torch.zeros(len(slots), ops.LAYER_SIZE, dtype=layers.dtype, device=layers.device)
            )
            self._parts[key] = ops.TensorList(entries, 1, ops.Ledger(self.first.device), self.backend.chunk, own)
        return self._parts[key]
