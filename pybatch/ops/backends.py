"""The backends that run over a list of tensors: C++ on the CPU, CUDA C++, Triton."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from pybatch.base.errors import DeviceError, UsageError
from pybatch.ops.compiled import LAYER_SUMS, Reduce, core
from pybatch.ops.tensors import TensorList


class Backend(ABC):
    """Runs the passes over a list. Nothing here waits for the device."""

    name: ClassVar[str]
    chunk: ClassVar[int]  # elements a block works on at a time

    def step(self, tensors: TensorList, call: Any, reduce: Reduce | None = None) -> None:
        """One update of every tensor with a gradient: norm where `call.norm`, verdict, clip, rule, bookkeeping.

        Args:
            tensors: the list.
            call: its scalars; what follows from the rules (`row_norms`, `prepare`, a `norm` they need) is set here.
            reduce: sums the norms over the processes that share the tensors; the phases then run apart.
        """
        call.row_norms, call.prepare = tensors.row_norms, tensors.prepare
        call.norm = call.norm or (tensors.row_norms and not call.known)
        if reduce is None:
            self._run("step", tensors, call)
            return
        if call.norm or call.known:
            self._run("norm", tensors, call)
            sums = [tensors.ledger.sums, tensors.norms]
            reduce(sums if tensors.layers is None else [*sums, tensors.layers[:, :LAYER_SUMS]])
        if call.prepare:
            self._run("prepare", tensors, call)
            reduce([tensors.norms])
        self._run("update", tensors, call)

    def accumulate(self, tensors: TensorList, call: Any) -> None:
        """Add the gradients to the sums; squares of both go to the ledger."""
        self._run("accumulate", tensors, call)

    @abstractmethod
    def _run(self, entry: str, tensors: TensorList, call: Any) -> None:
        """Start "step", one of its phases "norm", "prepare", "update", or "accumulate"."""


class CppBackend(Backend):
    """C++ on the CPU, vectorized and threaded; uses as many threads as torch."""

    name, chunk = "cpp", 16384  # 64 KiB of fp32 gradient: large enough to stream, small enough to balance

    def _run(self, entry: str, tensors: TensorList, call: Any) -> None:
        call.threads = torch.get_num_threads()
        getattr(core, f"cpu_{entry}")(tensors.table, call)


class CudaBackend(Backend):
    """CUDA C++ on the current stream: one launch an update or accumulation, one more for a norm taken first."""

    name, chunk = "cuda", 32768  # 128 elements a thread: enough in flight, and 3000 blocks at 100 M parameters

    def _run(self, entry: str, tensors: TensorList, call: Any) -> None:
        with torch.cuda.device(tensors.device):
            tensors.send()
            code = getattr(core, f"cuda_{entry}")(tensors.table, call, torch.cuda.current_stream().cuda_stream)
        if code:
            name, text = core.cuda_error(code)
            raise DeviceError(f"CUDA launch on {tensors.device} failed: {name} ({text}).")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, where Triton launches and takes its stream from."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


class TritonBackend(Backend):
    """Triton over the same tables, where no CUDA build exists. On the CPU only under TRITON_INTERPRET=1."""

    name, chunk = "triton", 8192  # four turns of a program's loop

    def _run(self, entry: str, tensors: TensorList, call: Any) -> None:
        from pybatch.kernels import accumulate, step

        with on_device(tensors.device):
            tensors.send()
            getattr(accumulate if entry == "accumulate" else step, entry)(tensors, call)


BACKENDS: dict[str, type[Backend]] = {kind.name: kind for kind in (CppBackend, CudaBackend, TritonBackend)}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend can't work on tensors of this device, and what to do; None where it can."""
    kind = device.type
    if name == "cpp":
        return None if kind == "cpu" else f"it works on CPU tensors, these are on {device}. Use 'cuda' or 'triton'."
    if name == "cuda":
        if kind != "cuda":
            return f"it works on CUDA tensors, these are on {device}. Move the model, or use 'cpp'."
        if not core.cuda:
            return f"this pybatch was {core.cuda_reason}. Reinstall with nvcc on PATH, or use 'triton'."
        return None
    if kind not in ("cuda", "xpu", "cpu"):
        return f"it works on CUDA and XPU tensors, these are on {device}. Move the model."
    if find_spec("triton") is None:
        return "the package triton is not installed. Install it, or use 'cpp' (CPU) or 'cuda'."
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs CPU tensors only in its interpreter. Set TRITON_INTERPRET=1 before starting, or use 'cpp'."
    return None


def choose_backend(name: str | None, device: torch.device) -> Backend:
    """The backend of this name, or the best one for the device; raises UsageError or DeviceError with the remedy."""
    if name is not None and name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known. Use one of: {', '.join(BACKENDS)}, or None for the best.")
    reasons = {}
    for candidate in [name] if name else BACKENDS:
        reason = why_not(candidate, device)
        if reason is None:
            return BACKENDS[candidate]()
        reasons[candidate] = reason
    raise DeviceError(
        " ".join(f"backend {candidate!r} can't be used: {reason}" for candidate, reason in reasons.items())
    )


def example_kernels() -> Any:
    """The Triton kernels of per-example norms; ask `why_not("triton", device)` first."""
    from pybatch.kernels import per_example

    return per_example
