"""The step whose time is measured."""

from __future__ import annotations

import time

import torch

from pybatch.base.errors import WorkloadError
from pybatch.workloads.running import compiling
from pybatch.workloads.running.batches import Reused
from pybatch.workloads.running.optimizers import tensors_of
from pybatch.workloads.running.session import Session


class TrainingStep:
    """A full training step on a batch drawn beforehand: gradients cleared, forward, backward, the optimizer's update.

    The learning rate is 0. The update does the same arithmetic and moves the same bytes, and every batch size meets
    the same model in whatever order they are measured; a single batch trained on for thousands of steps would not be
    representative otherwise.

    Args:
        session: the model and its batches.
        compile: have torch.compile compile the forward and backward passes, for each batch size anew.
        capturable: keep the update's step count on the device, as a CUDA graph needs.
    """

    def __init__(self, session: Session, *, compile: bool = False, capturable: bool = False) -> None:
        self.session = session
        self.optimizer = session.optimizer(still=True, capturable=capturable)
        self.compiled = compile
        if compile:
            session.compile()
        self.compile_s: dict[int, float] = {}  # seconds, by batch size
        self.batch_size = 0
        self.changes: bool | None = None  # whether the loss changes its batch, which each step then puts back first
        self._batch: Reused | None = None
        self._loss: torch.Tensor | None = None

    def load(self, n: int) -> None:
        """Draw the batch that the following steps use, and compile for it; the one before is let go first."""
        self.clear()
        self._batch, self.batch_size = Reused(self.session.timed_batch(n), self.changes), n
        if self.session.compiled and n not in self.compile_s:
            self.compile_s[n] = self._compile()

    @property
    def setup_s(self) -> float:
        """Seconds that a batch size not met before takes until its first step: as the last one took to compile."""
        return next(reversed(self.compile_s.values()), 0.0)

    def clear(self) -> None:
        """Let go of the batch, the gradients and the loss."""
        self._batch = self._loss = None
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that stay between steps: parameters, buffers and the optimizer's state."""
        model = self.session.model
        tensors = [*model.parameters(), *model.buffers(), *tensors_of(self.optimizer)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __call__(self) -> None:
        """One step."""
        self.backward()
        self.session.update(self.optimizer)

    def backward(self) -> None:
        """The step without its update."""
        self.optimizer.zero_grad(set_to_none=True)
        assert self._batch is not None, "load() comes first"
        self._loss = self.session.backward(self._batch.get())

    def check(self) -> None:
        """Raise WorkloadError where the last step's loss is not finite. Synchronizes with the device."""
        if self._batch is not None:
            self._batch.settle()
            self.changes = self._batch.changes
        if self._loss is not None:
            self.session.check_finite(self._loss, f"at batch {self.batch_size}, on a freshly initialized model")

    def _compile(self) -> float:
        """Compile for the loaded batch: seconds that its first step takes longer than its second."""
        before, name = compiling.graphs_compiled(), self.session.workload.name
        try:
            first, second = self._wall_s(), self._wall_s()
        except WorkloadError as error:
            cause = compiling.compiler_failure(error.__cause__)
            if cause is None:
                raise
            raise WorkloadError(
                f"torch.compile fails on workload {name!r} at batch {self.batch_size}: {cause}. "
                "Without --compile (compile=True) its steps run eagerly."
            ) from error
        if compiling.graphs_compiled() == before:
            raise WorkloadError(
                f"torch.compile captured no graph of workload {name!r} at batch {self.batch_size}, so that its steps "
                "would run eagerly. Leave out --compile (compile=True), or see why with TORCH_LOGS=graph_breaks."
            )
        return max(0.0, first - second)

    def _wall_s(self) -> float:
        began = time.perf_counter()
        self()
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)
        return time.perf_counter() - began
