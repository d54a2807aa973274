"""The fused passes over a list of tensors: tables on the device, and the backends that run over them.

The only importer of the compiled module and of `pybatch.kernels`. All three backends (C++ on the CPU, CUDA C++, Triton)
work on the same plain tensors; what their columns mean is defined once, in kernels/table.h.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch  # before _C: both then share one OpenMP pool
from numpy.typing import ArrayLike

from pybatch import _C as _compiled
from pybatch.errors import DeviceError, UsageError

_C: Any = _compiled
Call = _C.Call  # the scalars of one step or accumulation
Watch = _C.Watch  # whether the tensors a table was built from still stand; see csrc/watch.h
Reduce = Callable[[list[torch.Tensor]], None]  # sums float64 tensors over processes, in place


class Rule(NamedTuple):
    """An update rule of kernels/rules.h."""

    number: int
    states: int  # fp32 values per element
    norms: Literal["none", "gradient", "direction"]  # of its whole tensor, which it needs first


DTYPES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _C.dtypes.items()}
STORAGES: dict[str, int] = dict(_C.storages)  # such as "float32", "bfloat16_master"; see kernels/table.h
RULES: dict[str, Rule] = {name: Rule(*of) for name, of in _C.rules.items()}
HYPER_COLUMNS: int = _C.hyper_columns
MAX_STATES: int = _C.max_states
LEDGER_SUMS = ("sum_sq", "bad", "micro_sq")
assert [_C.ledger[name] for name in LEDGER_SUMS] == [0, 1, 2]
LAYER_SIZE: int = _C.layer_size  # float64 values a tensor's own noise statistics take
LAYER_SUMS: int = _C.layer["ring"]  # of them, the first are sums of the step under way; then [blocks, 3]


@dataclass(frozen=True)
class Entry:
    """One tensor of a list.

    Attributes:
        param: dense tensor, updated in place.
        states: fp32 tensors of the same layout, as many as the rule has.
        rule: name in RULES.
        group: row of the hyper-parameters.
        step: updates it has had so far.
        storage: name in STORAGES; None: the parameter's dtype, without more.
        master: fp32 copy of the same layout for storage "..._master", int16 tensor for "..._remainder".
        salt: number that makes a tensor's random bits its own ("..._stochastic").
        share: this process's share of the tensor's squares in sums over processes; below 1 where it is replicated.
    """

    param: torch.Tensor
    states: tuple[torch.Tensor, ...]
    rule: str
    group: int
    step: torch.Tensor | float
    storage: str | None = None
    master: torch.Tensor | None = None
    salt: int = 0
    share: float = 1.0

    @property
    def storage_name(self) -> str:
        """Name in STORAGES."""
        return self.storage or str(self.param.dtype).removeprefix("torch.")


class Ledger:
    """Scalars of an optimizer that stay on its device until read, and the ring of noise pairs."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(_C.ledger_size, dtype=torch.float64, device=device)
        self.values[_C.ledger["ring_length"]] = 1.0
        self.values[_C.ledger["norm"]] = torch.nan
        self.ring = torch.zeros(_C.ring_rows, 3, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, values: torch.Tensor, ring: torch.Tensor) -> Ledger:
        """A ledger over tensors of another one."""
        ledger = cls.__new__(cls)
        ledger.values, ledger.ring = values, ring
        return ledger

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy of one scalar, 0-d float64 on the device; names as in kernels/table.h."""
        return self.values[_C.ledger[name]].clone()

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


class TensorList:
    """A list of tensors in the form every backend reads.

    Args:
        entries: the tensors, all on one device.
        groups: rows of hyper-parameters.
        ledger: the optimizer's scalars, on that device.
        backend: who will run over the list; decides the chunk size.

        layers: noise per tensor, float64 [tensors, LAYER_SIZE] on that device, updated in place; None: not kept.

    `steps` is float32 [tensors]; an element of it is a tensor's step count. States and masters are kept alive here.
    Parameters, gradients and sums are not: they are the caller's, who checks before every pass that they are where the
    table says.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        groups: int,
        ledger: Ledger,
        backend: Backend,
        layers: torch.Tensor | None = None,
    ) -> None:
        self.states, self.ledger, self.layers = [entry.states for entry in entries], ledger, layers
        self.masters = [entry.master for entry in entries]
        self.rules = tuple(sorted({RULES[entry.rule].number for entry in entries}))
        norms = {RULES[entry.rule].norms for entry in entries}
        self.row_norms, self.prepare = "gradient" in norms, "direction" in norms
        self.device = entries[0].param.device
        column = _C.columns
        host = torch.zeros(len(entries), _C.column_count, dtype=torch.int64)
        for row, entry in zip(host.numpy(), entries, strict=True):
            rule = RULES[entry.rule]
            assert len(entry.states) == rule.states <= MAX_STATES
            assert (entry.master is not None) == entry.storage_name.endswith(("_master", "_remainder"))
            row[column["param"]] = entry.param.data_ptr()
            for i, state in enumerate(entry.states):
                row[column["state0"] + i] = state.data_ptr()
            row[column["numel"]] = entry.param.numel()
            row[column["code"]] = rule.number * _C.storage_count + STORAGES[entry.storage_name]
            row[column["grad_type"]] = DTYPES[entry.param.dtype]
            row[column["group"]] = entry.group
            row[column["salt"]] = entry.salt
            if entry.master is not None:
                row[column["master"]] = entry.master.data_ptr()
        self._host, self._columns, self._stale = host, host.numpy(), True
        chunks = torch.from_numpy(_C.plan([entry.param.numel() for entry in entries], backend.chunk))
        device = self.device
        self.rows = host if device.type == "cpu" else torch.empty_like(host, device=device)
        self.chunks = chunks.to(device)
        self.starts = torch.searchsorted(chunks[:, 0].contiguous(), torch.arange(len(entries) + 1)).to(device)
        self.hyper = torch.zeros(groups, HYPER_COLUMNS, dtype=torch.float64, device=device)
        self.steps = torch.stack([_scalar(entry.step, device) for entry in entries])
        self.share = torch.tensor([entry.share for entry in entries], dtype=torch.float64).to(device)
        self.norms = torch.zeros(len(entries), _C.row_norm_count, dtype=torch.float64, device=device)
        self.carried = torch.full((len(entries),), torch.nan, dtype=torch.float64, device=device)
        self.partials = torch.zeros(len(chunks), 2, dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        table = _C.Table()
        table.rows, table.row_count = self.rows.data_ptr(), len(entries)
        table.chunks, table.chunk_count, table.chunk = self.chunks.data_ptr(), len(chunks), backend.chunk
        table.hyper, table.steps = self.hyper.data_ptr(), self.steps.data_ptr()
        table.ledger, table.ring = ledger.values.data_ptr(), ledger.ring.data_ptr()
        table.starts, table.share = self.starts.data_ptr(), self.share.data_ptr()
        table.norms, table.carried = self.norms.data_ptr(), self.carried.data_ptr()
        table.layers = 0 if layers is None else layers.data_ptr()
        table.partials, table.ticket = self.partials.data_ptr(), self.ticket.data_ptr()
        table.elements = sum(entry.param.numel() for entry in entries)
        self.table = table

    def set(self, name: str, values: ArrayLike) -> None:
        """Fill a column of the table ("grad", "grad_type", "sum", "fresh"), one value per tensor.

        "grad_type" is from DTYPES, and the parameter's dtype until it is set.
        """
        column = self._columns[:, _C.columns[name]]
        if not np.array_equal(column, values):
            column[:] = values
            self._stale = True

    def send(self) -> None:
        """Bring the device's table up to date; no synchronization."""
        if self._stale and self.rows is not self._host:
            refuse_capture(self.device, "a gradient, a sum or a parameter is in another place than in the step before")
            # A pinned block of its own per upload: torch's pinned allocator keeps it until the copy is done.
            self.rows.copy_(self._host.pin_memory(), non_blocking=True)
        self._stale = False

    def forget(self, rows: Sequence[int] | None = None) -> None:
        """Say that these parameters (None: all) were written by others: norms carried from the last update are void."""
        if rows is None:
            self.carried.fill_(torch.nan)
        elif rows:
            self.carried[torch.as_tensor(rows).to(self.device, non_blocking=True)] = torch.nan

    def discard(self) -> None:
        """Forget the sums of a step that will not be taken."""
        self.ledger.discard()
        if self.layers is not None:
            self.layers[:, :LAYER_SUMS] = 0.0

    def take_over(self, part: TensorList, rows: Sequence[int]) -> None:
        """Add what an accumulation over `part`, a list of these rows of this one, left in its own ledger and norms."""
        place = torch.as_tensor(rows).to(self.device, non_blocking=True)
        self.norms[place] = part.norms
        self.ledger.values[_C.ledger["bad"]].add_(part.ledger.values[_C.ledger["bad"]])
        self.ledger.values[_C.ledger["micro_sq"]].add_(part.ledger.values[_C.ledger["micro_sq"]])
        if self.layers is not None and part.layers is not None:
            micro = _C.layer["micro_sq"]
            self.layers[place, micro] += part.layers[:, micro]
            self.layers[place, _C.layer["sum_sq"]] = part.layers[:, _C.layer["sum_sq"]]
        part.discard()

    def sum_up(self, rows: Sequence[int]) -> None:
        """Take the square of all sums from those of these rows, which accumulations over parts have left."""
        place = torch.as_tensor(rows).to(self.device, non_blocking=True)
        self.ledger.values[_C.ledger["sum_sq"]] = self.norms[place, _C.row_norms["direction_sq"]].sum()

    def set_hyper(self, values: Sequence[Sequence[float]]) -> None:
        """Hyper-parameters per group: learning rate, maximize, then the rule's own in its header's order."""
        refuse_capture(self.device, "a hyper-parameter has changed")
        host = torch.zeros(self.hyper.shape, dtype=torch.float64)
        for row, group in zip(host, values, strict=True):
            row[: len(group)] = torch.tensor(group, dtype=torch.float64)
        self.hyper.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise UsageError where a CUDA graph is being captured, which must hold no upload from the host."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            f"step() in the capture of a CUDA graph: {why}, so tables would have to be uploaded. Take a step before "
            "the capture, keep gradients in place by zero_grad(set_to_none=False), and give lr as a tensor there."
        )


def _scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())


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
        getattr(_C, f"cpu_{entry}")(tensors.table, call)


class CudaBackend(Backend):
    """CUDA C++ on the current stream: one launch an update or accumulation, one more for a norm taken first."""

    name, chunk = "cuda", 32768  # 128 elements a thread: enough in flight, and 3000 blocks at 100 M parameters

    def _run(self, entry: str, tensors: TensorList, call: Any) -> None:
        with torch.cuda.device(tensors.device):
            tensors.send()
            code = getattr(_C, f"cuda_{entry}")(tensors.table, call, torch.cuda.current_stream().cuda_stream)
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
