"""A list of tensors in the form every backend reads: rows of addresses and sizes on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from pybatch.base.errors import UsageError
from pybatch.ops.compiled import DTYPES, HYPER_COLUMNS, LAYER_SUMS, RULES, STATE_TYPES, STORAGES, core
from pybatch.ops.ledger import Ledger

_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
_MOVING = [core.columns[name] for name in ("grad", "grad_type", "sum", "fresh")]  # columns that `set` fills
MAX_TABLES = 16  # kept of a list on its device: the places of its gradients come back after a few steps
_FEW = 8  # norms that are made void one by one: a launch each


@dataclass(frozen=True)
class Entry:
    """One tensor of a list.

    Attributes:
        param: dense tensor, updated in place.
        states: tensors of the same layout, as many as the rule has: fp32, bf16, or uint8 codes.
        scales: of codes: fp32 [blocks] a state.
        rule: name in RULES.
        group: row of the hyper-parameters.
        step: updates it has had so far.
        scalar: what the rule keeps of it from step to step, where it does; None: as before the first step.
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
    scalar: torch.Tensor | float | None = None
    scales: tuple[torch.Tensor, ...] = ()

    @property
    def storage_name(self) -> str:
        """Name in STORAGES."""
        return self.storage or str(self.param.dtype).removeprefix("torch.")


class TensorList:
    """A list of tensors in the form every backend reads.

    Args:
        entries: the tensors, all on one device.
        groups: rows of hyper-parameters.
        ledger: the optimizer's scalars, on that device.
        chunk: elements that a block of the backend works on at a time.
        layers: noise per tensor, float64 [tensors, LAYER_SIZE] on that device, updated in place; None: not kept.
        state_type: of all states, a name in STATE_TYPES.

    `steps` and `scalars` are float32 [tensors]: an element is a tensor's step count, and what its rule keeps of it from
    step to step. States and masters are kept alive here.
    Parameters, gradients and sums are not: they are the caller's, who checks before every pass that they are where the
    table says.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        groups: int,
        ledger: Ledger,
        chunk: int,
        layers: torch.Tensor | None = None,
        state_type: str = "fp32",
    ) -> None:
        self.states, self.ledger, self.layers = [entry.states for entry in entries], ledger, layers
        self.scales = [entry.scales for entry in entries]
        self.masters = [entry.master for entry in entries]
        self._kinds: set[tuple[int, int]] = set()  # seen so far
        self._unseen = True  # whether there may be others
        self.codes = None  # what codes of 8 bits stand for, fp32 [2, 256]: without and with a sign
        if state_type == "8bit":
            self.codes = torch.tensor(core.state_codes, dtype=torch.float32).to(entries[0].param.device)
        self.rules = tuple(sorted({RULES[entry.rule].number for entry in entries}))
        norms = {RULES[entry.rule].norms for entry in entries}
        self.row_norms, self.prepare = "gradient" in norms, "direction" in norms
        self.device = entries[0].param.device
        column = core.columns
        host = torch.zeros(len(entries), core.column_count, dtype=torch.int64)
        for row, entry in zip(host.numpy(), entries, strict=True):
            rule = RULES[entry.rule]
            assert len(entry.states) == rule.states
            assert (entry.master is not None) == entry.storage_name.endswith(("_master", "_remainder"))
            row[column["param"]] = entry.param.data_ptr()
            for i, state in enumerate(entry.states):
                assert state.dtype == _STATE_DTYPES[state_type]
                row[column["state"] + i] = state.data_ptr()
            assert len(entry.scales) == (rule.states if state_type == "8bit" else 0)
            for i, scale in enumerate(entry.scales):
                row[column["scale"] + i] = scale.data_ptr()
            row[column["numel"]] = entry.param.numel()
            row[column["code"]] = rule.number * core.storage_count + STORAGES[entry.storage_name]
            row[column["grad_type"]] = DTYPES[entry.param.dtype]
            row[column["group"]] = entry.group
            row[column["salt"]] = entry.salt
            if entry.master is not None:
                row[column["master"]] = entry.master.data_ptr()
        self._host, self._columns, self._stale = host, host.numpy(), True
        self._filled: dict[str, bytes] = {}  # by `set`: in one piece, where a column is spread over all rows
        chunks = torch.from_numpy(core.plan([entry.param.numel() for entry in entries], chunk))
        device = self.device
        self.rows = host
        self._sent: dict[bytes, torch.Tensor] = {}  # tables on the device by what `set` has filled
        self._captured: dict[int, torch.Tensor] = {}
        self._places: dict[tuple[int, ...], torch.Tensor] = {}
        self.chunks = chunks.to(device)
        self.starts = torch.searchsorted(chunks[:, 0].contiguous(), torch.arange(len(entries) + 1)).to(device)
        self.hyper = torch.zeros(groups, HYPER_COLUMNS, dtype=torch.float64, device=device)
        self.steps = torch.stack([_scalar(entry.step, device) for entry in entries])
        self.scalars = torch.stack([_scalar(_kept(entry), device) for entry in entries])
        self.share = torch.tensor([entry.share for entry in entries], dtype=torch.float64).to(device)
        self.norms = torch.zeros(len(entries), core.row_norm_count, dtype=torch.float64, device=device)
        self.carried = torch.full((len(entries),), torch.nan, dtype=torch.float64, device=device)
        self.partials = torch.zeros(len(chunks), 2, dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        table = core.Table()
        table.rows, table.row_count = self.rows.data_ptr(), len(entries)
        table.chunks, table.chunk_count, table.chunk = self.chunks.data_ptr(), len(chunks), chunk
        table.hyper, table.steps = self.hyper.data_ptr(), self.steps.data_ptr()
        table.ledger, table.ring = ledger.values.data_ptr(), ledger.ring.data_ptr()
        table.scalars = self.scalars.data_ptr()
        table.starts, table.share = self.starts.data_ptr(), self.share.data_ptr()
        table.norms, table.carried = self.norms.data_ptr(), self.carried.data_ptr()
        table.layers = 0 if layers is None else layers.data_ptr()
        table.partials, table.ticket = self.partials.data_ptr(), self.ticket.data_ptr()
        table.elements = sum(entry.param.numel() for entry in entries)
        table.states = STATE_TYPES[state_type]
        self.table = table

    def set(self, name: str, values: ArrayLike) -> None:
        """Fill a column of the table ("grad", "grad_type", "sum", "fresh"), one value per tensor.

        "grad_type" is from DTYPES, and the parameter's dtype until it is set.
        """
        given = np.asarray(values, dtype=np.int64)
        content = given.tobytes()
        if self._filled.get(name) != content:
            self._columns[:, core.columns[name]] = given
            self._filled[name] = content
            self._stale = self._unseen = True

    def kinds(self, rules: Iterable[int] | None = None, *, accumulated: bool) -> tuple[tuple[int, int], ...]:
        """Different (code, type of the gradient) of tensors that had a gradient so far, in ascending order.

        Args:
            rules: of these alone; None: of all.
            accumulated: the gradients are the sums, which are fp32.
        """
        if self._unseen:
            column = core.columns
            code, dtype, grad, total = (self._columns[:, column[name]] for name in ("code", "grad_type", "grad", "sum"))
            both = np.unique((code * len(DTYPES) + dtype)[(grad != 0) | (total != 0)])
            self._kinds |= {divmod(pair, len(DTYPES)) for pair in both.tolist()}
            self._unseen = False
        found = {(code, DTYPES[torch.float32] if accumulated else dtype) for code, dtype in self._kinds}
        wanted = set(self.rules if rules is None else rules)
        return tuple(sorted(pair for pair in found if pair[0] // core.storage_count in wanted))

    def send(self) -> None:
        """Bring the device's table up to date; no synchronization, and no upload of what is there from before.

        Gradients go back to the places they had one or a few steps ago: tables are kept, not overwritten.
        """
        if not reads_host(self.device):
            if self._stale:
                self._use(self._columns[:, _MOVING].tobytes())
            if capturing(self.device):  # replays read it as long as the graph lives
                self._captured[self.rows.data_ptr()] = self.rows
        self._stale = False

    def _use(self, content: bytes) -> None:
        if content not in self._sent:
            refuse_capture(self.device, "a gradient, a sum or a parameter is in another place than in the step before")
            if len(self._sent) == MAX_TABLES:
                del self._sent[next(iter(self._sent))]  # the one whose use is longest ago
            self._sent[content] = upload(self._host, self.device)
        self.rows = self._sent[content] = self._sent.pop(content)
        self.table.rows = self.rows.data_ptr()

    def forget(self, rows: Sequence[int] | None = None) -> None:
        """Say that these parameters (None: all) were written by others: norms carried from the last update are void.

        Nothing is uploaded, so that it can be captured: of many parameters, those of all are taken anew.
        """
        if rows is None or len(rows) > _FEW:
            self.carried.fill_(torch.nan)
            return
        for row in rows:
            self.carried[row].fill_(torch.nan)

    def discard(self) -> None:
        """Forget the sums of a step that will not be taken."""
        self.ledger.discard()
        if self.layers is not None:
            self.layers[:, :LAYER_SUMS] = 0.0

    def take_over(self, part: TensorList, rows: Sequence[int]) -> None:
        """Add what an accumulation over `part`, a list of these rows of this one, left in its own ledger and norms."""
        place = self._place(rows)
        self.norms[place] = part.norms
        self.ledger.values[core.ledger["bad"]].add_(part.ledger.values[core.ledger["bad"]])
        self.ledger.values[core.ledger["micro_sq"]].add_(part.ledger.values[core.ledger["micro_sq"]])
        if self.layers is not None and part.layers is not None:
            micro = core.layer["micro_sq"]
            self.layers[place, micro] += part.layers[:, micro]
            self.layers[place, core.layer["sum_sq"]] = part.layers[:, core.layer["sum_sq"]]
        part.discard()

    def sum_up(self, rows: Sequence[int]) -> None:
        """Take the square of all sums from those of these rows, which accumulations over parts have left."""
        place = self._place(rows)
        self.ledger.values[core.ledger["sum_sq"]] = self.norms[place, core.row_norms["direction_sq"]].sum()

    def _place(self, rows: Sequence[int]) -> torch.Tensor:
        """Indices on the device; those of the buckets of before are still there."""
        key = tuple(rows)
        if key not in self._places:
            if len(self._places) == MAX_TABLES:
                del self._places[next(iter(self._places))]
            self._places[key] = upload(torch.tensor(key, dtype=torch.int64), self.device)
        return self._places[key]

    def set_hyper(self, values: Sequence[Sequence[float]]) -> None:
        """Hyper-parameters per group: rows as `UpdateRule.row` gives them."""
        refuse_capture(self.device, "a hyper-parameter has changed")
        host = torch.tensor(values, dtype=torch.float64).reshape(self.hyper.shape)
        self.hyper.copy_(upload(host, self.device))


def reads_host(device: torch.device) -> bool:
    """Whether passes on this device read the host's memory: the table then needs no copy."""
    return device.type == "cpu"


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, without a wait: torch's pinned allocator keeps the block until the copy is done."""
    return (values.pin_memory() if device.type in ("cuda", "xpu") else values).to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise UsageError where a CUDA graph is being captured, which must hold no upload from the host."""
    if capturing(device):
        raise UsageError(
            f"a fused optimizer in the capture of a CUDA graph: {why}, so tables would have to be uploaded. Take the "
            "same step before the capture, keep gradients in place (zero_grad(set_to_none=False); for accumulate() "
            "give p.grad the same tensors), and give lr as a tensor on the device."
        )


def _kept(entry: Entry) -> torch.Tensor | float:
    return (RULES[entry.rule].scalar or 0.0) if entry.scalar is None else entry.scalar


def _scalar(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())
