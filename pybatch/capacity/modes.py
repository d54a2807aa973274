"""How a step is run: eagerly, compiled by torch.compile, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import cuda

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.capacity.step import TrainingStep
from pybatch.records import StepMode
from pybatch.workloads.running.session import is_out_of_memory

_WARM_UP = 3  # steps before a capture, as torch's notes on CUDA graphs advise


@dataclass(frozen=True)
class Mode:
    """What is done to the workload's step before it is timed."""

    compile: bool = False
    graph: bool = False

    @property
    def name(self) -> StepMode:
        """As the record calls it."""
        if self.compile:
            return "compiled, graph" if self.graph else "compiled"
        return "graph" if self.graph else "eager"

    def check(self, device: torch.device, dtype: str = "fp32") -> None:
        """Raise UsageError for a device or a dtype that has no such mode."""
        if self.graph and dtype == "fp16":
            raise UsageError(
                "CUDA graphs were asked for (--cuda-graph, graph=True) in fp16, whose steps ask the device whether "
                "gradients overflowed. Take bf16, or leave them out."
            )
        if self.graph and device.type != "cuda":
            raise UsageError(
                f"CUDA graphs were asked for (--cuda-graph, graph=True) on {device}: only a CUDA device replays them. "
                "Leave that out, or name a GPU."
            )


EAGER = Mode()


class GraphedStep:
    """A training step captured in CUDA graphs at its first call after `load`, and replayed by this and every other.

    There are two graphs: forward and backward, then the update. Captured with gradients of None, the backward pass
    puts them into the first graph's memory, where every replay writes them anew without clearing or adding. The update
    needs their addresses in its table, which a capture cannot upload, so it runs once between the captures, after a
    replay that makes the gradients real: at a learning rate of 0 that changes no parameter, whereas a capture leaves
    memory as it was, and 0 times NaN is NaN. The batch is the static input.

    Capture follows "Whole-network capture" in torch's notes on CUDA graphs. Until the first call after `load` the step
    itself may run eagerly; after it, it may not, as that would move the gradients.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self._graphs: list[cuda.CUDAGraph] = []

    def load(self, n: int) -> None:
        """Draw the batch that the following steps use; graphs of the one before are let go first."""
        self.clear()
        self.step.load(n)

    def clear(self) -> None:
        """Let go of the graphs, the batch, the gradients and the loss."""
        self._graphs = []
        self.step.clear()

    def __call__(self) -> None:
        """One step."""
        if not self._graphs:
            self._capture()
        for graph in self._graphs:
            graph.replay()

    def check(self) -> None:
        """As of `TrainingStep`."""
        self.step.check()

    def _capture(self) -> None:
        step, device = self.step, self.step.session.device
        try:
            with cuda.device(device):
                side = cuda.Stream(device)  # type: ignore[no-untyped-call]
                here = cuda.current_stream(device)
                side.wait_stream(here)
                with cuda.stream(side):
                    for _ in range(_WARM_UP):
                        step()
                here.wait_stream(side)
                step.optimizer.zero_grad(set_to_none=True)
                backward = _captured(step.backward, side)
                backward.replay()
                step.optimizer.step()
                self._graphs = [backward, _captured(step.optimizer.step, side)]
        except WorkloadError as error:
            raise WorkloadError(f"{error} This was in a CUDA graph; without --cuda-graph it may run.") from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise WorkloadError(
                f"a step of workload {step.session.workload.name!r} cannot be captured in a CUDA graph: {error}. "
                "Leave out --cuda-graph, or take out of loss() and the model what waits for the device."
            ) from error


def _captured(work: Callable[[], object], stream: cuda.Stream) -> cuda.CUDAGraph:
    graph = cuda.CUDAGraph()
    # torch's own capture stream is of the device that it was first used on; work of another would not be captured.
    with cuda.graph(graph, stream=stream):
        work()
    return graph
