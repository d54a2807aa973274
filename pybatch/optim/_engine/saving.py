"""State dictionaries, copies and pickles of an optimizer: torch's, with what only pybatch has beside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine import states, statistics
from pybatch.optim._engine.options import Options, ParamRule
from pybatch.optim._engine.tables import Tables

# Arguments that one optimizer has and another has not; schedulers and users add names of their own to groups.
_TELLING = ("betas", "eps", "momentum", "dampening", "momentum_decay")


class SavedOptimizer(Optimizer):
    """The part of a fused optimizer that is saved and loaded; what a step has under way is not."""

    _options: Options
    _ledger: ops.Ledger | None
    _tables: Tables | None
    _saved_layers: dict[int, torch.Tensor]
    _single_steps: int
    _seed: int
    torch_flags: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _reset(self, ledger: ops.Ledger | None = None, single_steps: int = 0, seed: int | None = None) -> None:
        """Forget tables and sums, which are made anew by the next step."""

    @classmethod
    @abstractmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Raise UsageError where a group's own hyper-parameters are outside their range."""

    @classmethod
    @abstractmethod
    def _rule(cls, group: dict[str, Any], param: torch.Tensor) -> ParamRule:
        """How a parameter is updated: from its shape and the group's `rule_options`."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, readable by the twin, with its keys and no more.

        What only pybatch has, and only where it was asked for (noise, random bits), is one more state of the first
        parameter: checkpoints of sharded models carry states and nothing beside them.
        """
        own, bearer = self._own_state(), self._bearer()
        if own is not None and bearer is not None and (self._options.noise or self._options.random):
            for entry in self.state.values():
                entry.pop(statistics.STATE, None)  # another one bore it, before it was frozen
            self.state[bearer][statistics.STATE] = own
        state = super().state_dict()
        if self._options.state_dtype != "fp32":
            state["state"] |= self._wide_states(state)
        return state

    def fp32_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """The states of a parameter of this group in fp32, as `state_dict` has them; empty before its first step."""
        return states.in_fp32(param, self.state.get(param, {}), self._rule(group, param))

    def _wide_states(self, state: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """States in fp32: the twin loads them, and an optimizer of any state_dtype; of its own, to the same bits."""
        groups = [(group, param) for group in self.param_groups for param in group["params"]]
        ids = [i for group in state["param_groups"] for i in group["params"]]
        return {
            i: states.in_fp32(param, state["state"][i], self._rule(group, param))
            for i, (group, param) in zip(ids, groups, strict=True)
            if i in state["state"]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; takes the twin's dictionaries too. States keep fp32 where torch would cast them."""
        own = [entry[statistics.STATE] for entry in state_dict["state"].values() if statistics.STATE in entry]
        for saved in own[:1]:
            statistics.unpacked(saved)  # what can't be loaded is refused before anything is changed
        self._check_groups(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            entry.pop(statistics.STATE, None)  # torch has cast it to the parameter's dtype
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(saved_ids, self._params(), strict=True):
            saved = state_dict["state"].get(i, {})
            if param.dtype != torch.float32:
                for name, value in saved.items():
                    if isinstance(value, torch.Tensor) and name not in ("step", statistics.STATE):
                        dtype = torch.float32 if value.is_floating_point() else value.dtype
                        self.state[param][name] = value.to(param.device, dtype)
        if not own:  # of the twin, or made without noise: what was measured before belongs to another run
            self._ledger, self._saved_layers, self._single_steps = None, {}, 0
        self._load_own(own[0] if own else None)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raise UsageError where saved groups are those of an optimizer whose arguments mean something else."""
        for own, saved in zip(self.param_groups, groups, strict=False):  # torch refuses another number of them
            kind, other = ({name for name in _TELLING if name in group} for group in (own, saved))
            # Muon's groups have more than its twin's, as some of its parameters are AdamW's.
            alike = kind == other or (kind & other & {"momentum"} and not (kind ^ other) & {"dampening"})
            if not alike:
                text = f"load_state_dict(): the state is another optimizer's, by {' and '.join(sorted(kind ^ other))}"
                raise UsageError(f"{text}. Give one of {type(self).__name__}.")
            try:
                self._check({**own, **saved, "params": own["params"]})
            except UsageError as error:
                raise UsageError(f"load_state_dict(): {error} The state is another optimizer's, it seems.") from None

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("accumulates", "warns") if name in self.__dict__}
        return super().__getstate__() | own | {"_options": self._options, "_copied": self._own_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For torch's load_state_dict, copies and pickles alike: addresses are taken anew at the next step."""
        copied = state.pop("_copied", None)
        ledger: ops.Ledger | None = self.__dict__.get("_ledger")
        if ledger is not None:
            ledger.discard()
        seed: int | None = self.__dict__.get("_seed")
        self._options = state.pop("_options", None) or self._options
        self._reset(ledger, self.__dict__.get("_single_steps", 0), seed)
        self._load_own(copied)
        super().__setstate__(state)
        if "differentiable" not in self.torch_flags:
            self.defaults.pop("differentiable", None)  # torch has added it
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _bearer(self) -> torch.Tensor | None:
        """The parameter whose states bear what is not a parameter's own."""
        return next((param for param in self._params() if param.requires_grad), None)

    def _own_state(self) -> torch.Tensor | None:
        if self._ledger is None:
            return None
        return statistics.packed(self._ledger, self._layers(), len(self._params()), self._single_steps, self._seed)

    def _layers(self) -> dict[int, torch.Tensor]:
        return self._saved_layers | ({} if self._tables is None else self._tables.layers())

    def _load_own(self, saved: torch.Tensor | None) -> None:
        if saved is not None:
            self._ledger, self._saved_layers, self._single_steps, seed = statistics.unpacked(saved)
            if self._options.random:
                self._seed = seed

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]
