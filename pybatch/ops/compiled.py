"""The compiled module: its call objects, and what its tables and rules are, defined once in kernels/table.h."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch  # before _C: both then share one OpenMP pool

from pybatch.base.errors import InstallationError


def _missing() -> InstallationError:
    """What there is in place of the compiled module: most often a clone of the sources that hides the installed one."""
    tree = Path(__file__).parents[1]
    installed = next((str(p) for p in map(Path, sys.path) if any((p / "pybatch").glob("_C.*.so"))), None)
    hides = f", which hides the one installed in {installed}," if installed is not None else ""
    return InstallationError(
        f"Python took pybatch from the sources in {tree}{hides} and they hold no compiled core (pybatch._C). Install "
        f"them in place, 'pip install -e {tree.parent}', or start Python from another folder."
    )


try:
    from pybatch import _C as _compiled
except ImportError as error:
    if error.name != "pybatch":  # it is there, but does not load: its own words say why
        raise
    raise _missing() from None

core: Any = _compiled
Call = core.Call  # the scalars of one step or accumulation
Snapshot = core.Snapshot  # whether the tensors a table was built from still stand; see csrc/snapshot.h
Reduce = Callable[[list[torch.Tensor]], None]  # sums float64 tensors over processes, in place


class UpdateRule(NamedTuple):
    """An update rule of kernels/rules.h."""

    number: int
    states: int  # values per element
    norms: Literal["none", "gradient", "direction"]  # of its whole tensor, which it needs first
    hyper: Mapping[str, int]  # its own hyper-parameters, and their columns in a row
    scalar: float | None  # what it keeps of each tensor from step to step is this at first; None: it keeps nothing
    squares: int  # bit k: state k is never negative

    def row(self, lr: float, own: Mapping[str, float], *, maximize: bool = False) -> list[float]:
        """A group's row of hyper-parameters; `own` are those that the rule's header names, no fewer and no more."""
        if own.keys() != self.hyper.keys():
            raise ValueError(f"hyper-parameters {sorted(own)}: this rule's are {sorted(self.hyper)}.")
        row = [0.0] * HYPER_COLUMNS
        row[core.hyper["lr"]], row[core.hyper["maximize"]] = lr, float(maximize)
        for name, value in own.items():
            row[self.hyper[name]] = value
        return row


DTYPES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in core.dtypes.items()}
STORAGES: dict[str, int] = dict(core.storages)  # such as "float32", "bfloat16_master"; see kernels/table.h
STATE_TYPES: dict[str, int] = dict(core.state_types)  # "fp32", "bf16", "8bit": how states are kept between steps
STATE_BLOCK: int = core.state_block  # elements of an 8-bit state that share a scale
RULES: dict[str, UpdateRule] = {name: UpdateRule(*of) for name, of in core.rules.items()}
HYPER_COLUMNS: int = core.hyper_columns
LEDGER_SUMS = ("sum_sq", "bad", "micro_sq")
assert [core.ledger[name] for name in LEDGER_SUMS] == [0, 1, 2]
LAYER_SIZE: int = core.layer_size  # float64 values a tensor's own noise statistics take
LAYER_SUMS: int = core.layer["ring"]  # of them, the first are sums of the step under way; then [blocks, 3]


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
        cpu_width=core.cpu_width(),
        cuda=core.cuda,
        cuda_architectures=getattr(core, "cuda_architectures", None),
        cuda_reason=getattr(core, "cuda_reason", None),
    )
