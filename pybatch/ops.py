"""The fused passes over a list of tensors: tables on the device, and the backends that run over them.

The only importer of the compiled module and of `pybatch.kernels`. All three backends (C++ on the CPU, CUDA C++, Triton)
work on the same plain tensors; what their columns mean is defined once, in kernels/table.h.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch  # before _C: both then share one OpenMP pool

from pybatch import _C as _compiled
from pybatch.errors import DeviceError, UsageError

_C: Any = _compiled
Call = _C.Call  # the scalars of one step or accumulation
DTYPES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _C.dtypes.items()}
RULES: dict[str, tuple[int, int]] = dict(_C.rules)  # name: (number, states per element)
HYPER_COLUMNS: int = _C.hyper_columns
MAX_STATES = _C.columns["numel"] - _C.columns["state0"]


@dataclass(frozen=True)
class Entry:
    """One tensor of a list.

    Attributes:
        param: dense tensor, updated in place.
        states: fp32 tensors of the same layout, as many as the rule has.
        rule: name in RULES.
        group: row of the hyper-parameters.
        step: updates it has had so far.
    """

    param: torch.Tensor
    states: tuple[torch.Tensor, ...]
    rule: str
    group: int
    step: torch.Tensor | float


class Ledger:
    """Scalars of an optimizer that stay on its device until read, and the ring of noise pairs."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(_C.ledger_size, dtype=torch.float64, device=device)
        self.values[_C.ledger["ring_length"]] = 1.0
        self.values[_C.ledger["norm"]] = torch.nan
        self.ring = torch.zeros(_C.ring_rows, 3, dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of one scalar, 0-d float64 on the device; names as in kernels/table.h."""
        return self.values[_C.ledger[name]].clone()

    def discard(self) -> None:
        """Forget the sums of a step that will not be taken."""
        for name in ("sum_sq", "bad", "micro_sq"):
            self.values[_C.ledger[name]] = 0.0

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


class TensorList:
    """A list of tensors in the form every backend reads.

    Args:
        entries: the tensors, all on one device.
        groups: rows of hyper-parameters.
        ledger: the optimizer's scalars, on that device.
        backend: who will run over the list; decides the chunk size.

    `steps` is float32 [tensors]; an element of it is a tensor's step count. States are kept alive here. Parameters,
    gradients and sums are not: they are the caller's, who checks before every pass that they are where the table says.
    """

    def __init__(self, entries: Sequence[Entry], groups: int, ledger: Ledger, backend: Backend) -> None:
        self.states, self.ledger = [entry.states for entry in entries], ledger
        self.device = entries[0].param.device
        column = _C.columns
        host = torch.zeros(len(entries), _C.column_count, dtype=torch.int64)
        for row, entry in zip(host.numpy(), entries, strict=True):
            number, states = RULES[entry.rule]
            assert len(entry.states) == states <= MAX_STATES
            row[column["param"]] = entry.param.data_ptr()
            for i, state in enumerate(entry.states):
                row[column["state0"] + i] = state.data_ptr()
            row[column["numel"]] = entry.param.numel()
            row[column["code"]] = number * _C.dtype_count + DTYPES[entry.param.dtype]
            row[column["group"]] = entry.group
        self._host, self._columns, self._stale = host, host.numpy(), True
        self._sent: dict[str, list[int]] = {}
        chunks = torch.from_numpy(_C.plan([entry.param.numel() for entry in entries], backend.chunk))
        device = self.device
        self.rows = host if device.type == "cpu" else torch.empty_like(host, device=device)
        self.chunks = chunks.to(device)
        self.hyper = torch.zeros(groups, HYPER_COLUMNS, dtype=torch.float64, device=device)
        self.steps = torch.stack([_scalar(entry.step, device) for entry in entries])
        self.partials = torch.zeros(len(chunks), 2, dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        table = _C.Table()
        table.rows, table.row_count = self.rows.data_ptr(), len(entries)
        table.chunks, table.chunk_count, table.chunk = self.chunks.data_ptr(), len(chunks), backend.chunk
        table.hyper, table.steps = self.hyper.data_ptr(), self.steps.data_ptr()
        table.ledger, table.ring = ledger.values.data_ptr(), ledger.ring.data_ptr()
        table.partials, table.ticket = self.partials.data_ptr(), self.ticket.data_ptr()
        table.elements = sum(entry.param.numel() for entry in entries)
        self.table = table

    def set(self, name: str, values: list[int]) -> None:
        """Fill a column of the table ("grad", "sum", "fresh"), one value per tensor."""
        if self._sent.get(name) != values:
            self._columns[:, _C.columns[name]] = values
            self._sent[name] = values
            self._stale = True

    def send(self) -> None:
        """Bring the device's table up to date; no synchronization."""
        if self._stale and self.rows is not self._host:
            # A pinned block of its own per upload: torch's pinned allocator keeps it until the copy is done.
            self.rows.copy_(self._host.pin_memory(), non_blocking=True)
        self._stale = False

    def set_hyper(self, values: Sequence[Sequence[float]]) -> None:
        """Hyper-parameters per group: learning rate, maximize, then the rule's own in its header's order."""
        host = torch.zeros(self.hyper.shape, dtype=torch.float64)
        for row, group in zip(host, values, strict=True):
            row[: len(group)] = torch.tensor(group, dtype=torch.float64)
        self.hyper.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)


def _scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())


class Backend(ABC):
    """Runs the two passes over a list. Nothing here waits for the device."""

    name: ClassVar[str]
    chunk: ClassVar[int]  # elements a block works on at a time

    @abstractmethod
    def step(self, tensors: TensorList, call: Any) -> None:
        """One update of every tensor with a gradient: norm where `call.norm`, verdict, clip, rule, bookkeeping."""

    @abstractmethod
    def accumulate(self, tensors: TensorList, call: Any) -> None:
        """Add the gradients to the sums; squares of both go to the ledger."""


class CppBackend(Backend):
    """C++ on the CPU, vectorized and threaded; uses as many threads as torch."""

    name, chunk = "cpp", 16384  # 64 KiB of fp32 gradient: large enough to stream, small enough to balance

    def step(self, tensors: TensorList, call: Any) -> None:
        call.threads = torch.get_num_threads()
        _C.cpu_step(tensors.table, call)

    def accumulate(self, tensors: TensorList, call: Any) -> None:
        call.threads = torch.get_num_threads()
        _C.cpu_accumulate(tensors.table, call)


class CudaBackend(Backend):
    """CUDA C++ on the current stream: one launch an update or accumulation, one more for a norm taken first."""

    name, chunk = "cuda", 32768  # 128 elements a thread: enough in flight, and 3000 blocks at 100 M parameters

    def step(self, tensors: TensorList, call: Any) -> None:
        self._launch(_C.cuda_step, tensors, call)

    def accumulate(self, tensors: TensorList, call: Any) -> None:
        self._launch(_C.cuda_accumulate, tensors, call)

    @staticmethod
    def _launch(entry: Any, tensors: TensorList, call: Any) -> None:
        with torch.cuda.device(tensors.device):
            tensors.send()
            code = entry(tensors.table, call, torch.cuda.current_stream().cuda_stream)
        if code:
            name, text = _C.cuda_error(code)
            raise DeviceError(f"CUDA launch on {tensors.device} failed: {name} ({text}).")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, where Triton launches and takes its stream from."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


class TritonBackend(Backend):
    """Triton over the same tables, where no CUDA build exists. On the CPU only under TRITON_INTERPRET=1."""

    name, chunk = "triton", 4096

    def step(self, tensors: TensorList, call: Any) -> None:
        from pybatch.kernels import step

        with on_device(tensors.device):
            tensors.send()
            step.step(tensors, call)

    def accumulate(self, tensors: TensorList, call: Any) -> None:
        from pybatch.kernels import accumulate

        with on_device(tensors.device):
            tensors.send()
            accumulate.accumulate(tensors, call)


BACKENDS: dict[str, type[Backend]] = {kind.name: kind for kind in (CppBackend, CudaBackend, TritonBackend)}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend can't work on tensors of this device, and what to do; None where it can."""
    kind = device.type
    if name == "cpp":
        return None if kind == "cpu" else f"it works on CPU tensors, these are on {device}. Use 'cuda' or 'triton'."
    if name == "cuda":
        if kind != "cuda":
            return f"it works on CUDA tensors, these are on {device}. Move the model, or use 'cpp'."
        if not _C.cuda:
            return f"this pybatch was {_C.cuda_reason}. Reinstall with nvcc on PATH, or use 'triton'."
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


@dataclass(frozen=True)
class Build:
    """What this installation was compiled with."""

    cpu_width: str  # vector extension the CPU passes use here: "portable", "avx2", "avx512"
    cuda: bool
    cuda_architectures: str | None
    cuda_reason: str | None  # why there is no CUDA part


def build() -> Build:
    """What is compiled into this installation; `pybatch doctor` prints it."""
    return Build(
        cpu_width=_C.cpu_width(),
        cuda=_C.cuda,
        cuda_architectures=getattr(_C, "cuda_architectures", None),
        cuda_reason=getattr(_C, "cuda_reason", None),
    )


def example_kernels() -> Any:
    """The Triton kernels of per-example norms; ask `why_not("triton", device)` first."""
    from pybatch.kernels import per_example

    return per_example
