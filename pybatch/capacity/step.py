"""The step whose time is measured."""

from __future__ import annotations

from typing import Any

import torch

from pybatch.optim import AdamW
from pybatch.workloads.session import Session


class TrainingStep:
    """A full training step on a batch drawn beforehand: gradients cleared, forward, backward, AdamW's update.

    The learning rate is 0. The update does the same arithmetic and moves the same bytes, and every batch size meets
    the same model in whatever order they are measured; a single batch trained on for thousands of steps would not be
    representative otherwise.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.optimizer = AdamW(session.parameters, lr=0.0)
        self.batch_size = 0
        self._batch: Any = None
        self._loss: torch.Tensor | None = None

    def load(self, n: int) -> None:
        """Draw the batch that the following steps use; the one before is let go first."""
        self.clear()
        self._batch, self.batch_size = self.session.batch(n), n

    def clear(self) -> None:
        """Let go of the batch, the gradients and the loss."""
        self._batch = self._loss = None
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that stay between steps: parameters, buffers and the optimizer's state."""
        model = self.session.model
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, torch.Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = self.session.backward(self._batch)
        self.optimizer.step()

    def check(self) -> None:
        """Raise WorkloadError where the last step's loss is not finite. Synchronizes with the device."""
        if self._loss is not None:
            self.session.check_finite(self._loss, f"at batch {self.batch_size}, on a freshly initialized model")
