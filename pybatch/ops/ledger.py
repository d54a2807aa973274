"""Scalars of an optimizer on its device."""

from __future__ import annotations

import torch

from pybatch.base.errors import UsageError
from pybatch.ops.compiled import LEDGER_SUMS, core


class Ledger:
    """Scalars of an optimizer that stay on its device until read, and the ring of noise pairs."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(core.ledger_size, dtype=torch.float64, device=device)
        self.values[core.ledger["ring_length"]] = 1.0
        self.values[core.ledger["norm"]] = torch.nan
        self.ring = torch.zeros(core.ring_rows, 3, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, values: torch.Tensor, ring: torch.Tensor) -> Ledger:
        """A ledger over tensors of another one."""
        ledger = cls.__new__(cls)
        ledger.values, ledger.ring = values, ring
        return ledger

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of one scalar, 0-d float64 on the device; names as in kernels/table.h."""
        return self.values[core.ledger[name]].clone()

    @property
    def sums(self) -> torch.Tensor:
        """What passes of a step under way add up: a view, float64 [3]."""
        return self.values[: len(LEDGER_SUMS)]

    def discard(self) -> None:
        """Forget the sums of a step that will not be taken."""
        self.sums.zero_()

    def to(self, device: torch.device) -> None:
        """Move to another device, in place of the old tensors."""
        self.values, self.ring = self.values.to(device), self.ring.to(device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of both tensors, without the sums of a step under way."""
        copied = Ledger(self.values.device)
        copied.values.copy_(self.values)
        copied.discard()
        return {"ledger": copied.values, "ring": self.ring.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave; raises UsageError where the shapes are another version's."""
        for name, own in (("ledger", self.values), ("ring", self.ring)):
            if state[name].shape != own.shape:
                raise UsageError(
                    f"saved noise state {name!r} has shape {tuple(state[name].shape)}, this version's has "
                    f"{tuple(own.shape)}. Delete the key 'pybatch' of the state_dict to load the rest."
                )
            own.copy_(state[name])
        self.discard()
