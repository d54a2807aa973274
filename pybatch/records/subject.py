"""What was measured, where and how; and the notes that say why a figure is null."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pybatch.records.figure import figure


@dataclass(frozen=True)
class Note:
    """Why a figure is null, or what a reader must know of it."""

    figure: str  # path in the record, such as "batches.sm_active"
    text: str


@dataclass(frozen=True)
class Environment:
    """Where and how a run took place."""

    python: str
    platform: str
    pybatch: str
    torch: str | None
    commit: str | None  # of the checkout pybatch was run in, "-dirty" appended where it had changes
    driver: str | None
    cuda: str | None
    threads: int
    seed: int
    command: str
    libraries: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # that change speed, where set: OMP_NUM_THREADS, ...


@dataclass(frozen=True)
class Device:
    """The device a run was measured on."""

    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int | None
    cores: int | None = None  # CPU: cores usable by this process; GPU: multiprocessors
    uuid: str | None = None
    capability: str | None = None  # GPU: "9.0"; CPU: widest vector extension


@dataclass(frozen=True)
class Ceilings:
    """Roofs measured on the device, in the workload's dtype; the datasheet is quoted beside them."""

    gemm_flops: float | None  # FLOP/s of a large matrix product on random data
    copy_bytes_per_s: float | None  # bytes read + written per second by a large copy
    datasheet_flops: float | None = field(default=None, metadata=figure("datasheet", "FLOP/s", shown=False))


@dataclass(frozen=True)
class WorkloadInfo:
    """What was run."""

    name: str
    unit: str  # what one example of a batch is: "images", "sequences"
    parameters: int
    dtype: str
    model: str | None = None
    examples: int | None = None  # size of the training set; None: unlimited or unknown
    learning_rate: float | None = None
    reference_batch: int | None = None  # the batch size that the learning rate is for
    target: dict[str, float] = field(default_factory=dict)
    options: dict[str, int | float | str] = field(default_factory=dict)  # the workload's dials
    file_sha256: str | None = None  # of the user's file it is defined in, without what that imports
    optimizer: str | None = None  # its class, in lower case; None: a sweep's own, see its record
    optimizer_options: dict[str, str] = field(default_factory=dict)  # that were chosen: {"betas": "0.9/0.95"}
