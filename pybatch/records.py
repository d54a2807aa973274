"""Frozen records of every result, and their JSON.

One versioned schema, the same on CPU and GPU. A figure that could not be measured is None (JSON null), and a `Note`
in the same section names the figure and the reason. Nothing here imports torch: saved JSON is read anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pybatch.codec import decode, encode
from pybatch.errors import UsageError

SCHEMA = "pybatch/1"

BatchStatus = Literal["ok", "oom", "predicted_oom", "skipped"]
NoiseStatus = Literal["resolved", "lower_bound", "unresolved"]
PointStatus = Literal["reached", "not_reached", "diverged"]
Limit = Literal["noise", "hardware", "balanced", "unresolved"]
Evidence = Literal["measured", "modelled", "assumed"]

# Fields so marked stand at the top of the JSON record, beside their section.
_TOP = {"json": "top"}


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
    datasheet_flops: float | None = None


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
    target: dict[str, float] = field(default_factory=dict)
    options: dict[str, int | float | str] = field(default_factory=dict)  # the workload's dials


@dataclass(frozen=True)
class BatchPoint:
    """One batch size: a full training step (forward, backward, update) on a batch already on the device."""

    batch: int
    status: BatchStatus
    step_ms: float | None = None  # median over samples
    step_ms_low: float | None = None  # 95 % interval of the median
    step_ms_high: float | None = None
    samples_per_s: float | None = None
    host_bound: float | None = None  # share of the step the device waits for the host, 0..1
    model_flops: float | None = None  # FLOP per step, forward + backward, recomputation excluded
    mfu_measured: float | None = None  # model FLOP/s over ceilings.gemm_flops
    mfu_datasheet: float | None = None
    sm_active: float | None = None
    sm_occupancy: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None
    cpu_active: float | None = None  # CPU runs: share of the usable cores kept busy, 0..1
    memory_bytes: int | None = None  # peak during a step
    joules_per_sample: float | None = None
    sm_clock_mhz: float | None = None
    throttled: bool | None = None
    samples: int = 0  # steps timed
    reason: str | None = None  # why status is not ok


@dataclass(frozen=True)
class ThroughputFit:
    """Step time against batch size, seconds: t(B) = alpha + beta B, max(floor, alpha + beta B), or in waves.

    Intervals are 95 % by bootstrap over the measured steps.
    """

    model: Literal["affine", "floor", "wave"]
    t0_s: float  # alpha (affine), or the floor: time of a vanishing batch
    alpha_s: float
    beta_s: float  # seconds per example
    ceiling: float  # examples/s as B grows: 1 / beta
    ceiling_low: float
    ceiling_high: float | None  # None: the batches measured show no upper end
    half_batch: float  # batch at half the ceiling: alpha / beta for the affine model
    half_low: float
    half_high: float | None
    saturation_batch: float  # doubling it gains less than `gain`
    saturation_low: float
    saturation_high: float | None
    gain: float  # 0.05
    rms_log_error: float  # root mean square of ln(measured / fitted)
    batches: int  # batch sizes fitted
    wave: int | None = None  # examples the device takes at once: t = alpha + beta wave ceil(B / wave)

    def step_s(self, batch: float) -> float:
        """Modelled seconds per step at this batch size."""
        if self.wave is not None:
            batch = self.wave * math.ceil(batch / self.wave)
        time = self.alpha_s + self.beta_s * batch
        return max(self.t0_s, time) if self.model == "floor" else time


@dataclass(frozen=True)
class Capacity:
    """What the device does with this workload at each batch size, and where its ceiling is."""

    t0_ms: float | None
    ceiling_samples_per_s: float | None
    half_batch: float | None
    saturation_batch: float | None  # modelled; a doubling past it gains < 5 %
    saturation_low: float | None
    saturation_high: float | None
    saturation_measured: int | None  # smallest measured batch whose interval reaches 95 % of the ceiling
    max_batch: int | None  # largest batch that fits in memory
    max_batch_verified: bool | None  # True: a full step of that batch ran in a fresh process
    model: ThroughputFit | None
    drift: float | None = None  # anchor batch at the end over the same at the start, minus 1
    complete: bool = True  # False: stopped before every batch asked for was measured
    notes: tuple[Note, ...] = ()
    device: Device | None = field(default=None, metadata=_TOP)
    ceilings: Ceilings | None = field(default=None, metadata=_TOP)
    workload: WorkloadInfo | None = field(default=None, metadata=_TOP)
    batches: tuple[BatchPoint, ...] = field(default=(), metadata=_TOP)


@dataclass(frozen=True)
class DistributedPoint:
    """A data-parallel step on several devices, each with its own share of the batch."""

    devices: int
    batch: int  # examples per device
    compute_ms: float  # median, of the same steps without communication, on all devices at once
    step_ms: float  # median, of the slowest device in each step
    step_ms_low: float | None = None
    step_ms_high: float | None = None


@dataclass(frozen=True)
class CommunicationFit:
    """T = (T_c^gamma + T_n^gamma)^(1/gamma), T_n a ring all-reduce (Pollux: Qiao et al. 2021)."""

    gamma: float  # 1: computing and communicating one after the other; large: fully overlapped
    bandwidth_bytes_per_s: float | None  # None: transfer time was not told apart from latency
    latency_s: float  # per message
    bytes: int  # of the gradient
    rms_log_error: float  # root mean square of ln(measured / fitted)
    devices: int  # most that were measured: beyond, it is a model


@dataclass(frozen=True)
class Distributed:
    """What several devices do together with this workload."""

    devices: int
    backend: str  # "nccl", "gloo"
    points: tuple[DistributedPoint, ...]
    fit: CommunicationFit | None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class LayerNoise:
    """Gradient noise scale of one parameter tensor, or of one group of them that is communicated together."""

    name: str
    b_simple: float | None
    grad_sq: float | None  # unclamped means, as in NoiseScale
    trace: float | None
    low: float | None = None
    high: float | None = None
    status: NoiseStatus = "unresolved"
    steps: int = 0  # pairs of norms that entered
    reason: str | None = None  # why there is no number, or what to know of it


@dataclass(frozen=True)
class WeightedNoise:
    """tr(A Sigma) / (G^T A G) with its 95 % interval; the field it stands in says which matrix A is."""

    b_noise: float | None
    low: float | None
    high: float | None
    grad_sq: float | None  # G^T A G, unclamped mean
    trace: float | None  # tr(A Sigma), unclamped mean
    status: NoiseStatus
    steps: int  # pairs of norms that entered
    reason: str | None = None


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise scale B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, eq. 2.9), in examples.

    `resolved`: `low` and `high` bound it at 95 %. `lower_bound`: |G|^2 is not separated from zero, only `low` is
    known. `unresolved`: neither is. `grad_sq` and `trace` are the unclamped means and may be negative.
    """

    b_simple: float | None
    low: float | None
    high: float | None
    grad_sq: float | None
    trace: float | None
    status: NoiseStatus
    source: str  # "micro-batches", ...
    steps: int  # pairs of norms that entered
    small_batch: float | None = None
    large_batch: float | None = None
    skipped: int = 0  # steps left out for a non-finite gradient
    warmup_steps: int | None = None  # training steps before the measurement
    loss: float | None = None  # training loss where it was measured
    learning_rate: float | None = None  # of the warm-up training
    preconditioned: WeightedNoise | None = None  # experimental: A = 1 / (sqrt(v) + eps) of Adam
    layers: tuple[LayerNoise, ...] = ()
    notes: tuple[Note, ...] = ()
    hessian: WeightedNoise | None = None  # B_noise: A the Hessian of the loss (McCandlish et al. 2018, eq. 2.8)
    eval_mode: WeightedNoise | None = None  # A = 1, the model in evaluation mode: no dropout
    unit: str | None = None  # "tokens" where a batch is counted in them; None: in examples


@dataclass(frozen=True)
class NoisePoint:
    """The gradient noise scale over a stretch of a training run."""

    first_step: int  # training steps the pairs come from, both included
    last_step: int
    b_simple: float | None
    low: float | None
    high: float | None
    grad_sq: float | None
    trace: float | None
    status: NoiseStatus
    steps: int  # pairs of norms that entered
    loss: float | None = None  # mean of what was given for these steps
    reason: str | None = None


@dataclass(frozen=True)
class NoiseTrajectory:
    """The gradient noise scale against training steps."""

    points: tuple[NoisePoint, ...]
    source: str
    unit: str | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class RateSteps:
    """Steps to one target at one batch size and one learning rate, seed by seed."""

    learning_rate: float
    steps: tuple[float | None, ...]  # by seed; None where the status is not reached
    statuses: tuple[PointStatus, ...]  # by seed


@dataclass(frozen=True)
class ConvergencePoint:
    """Steps to one target at one batch size, over seeds, at the learning rate the rule gives or the best one tried."""

    batch: int
    steps: float | None  # median over seeds, an unreached target counting as infinite
    status: PointStatus
    seeds: int
    learning_rate: float | None
    steps_before: float | None = None  # median of the last evaluations above the target: steps lie between the two
    reached: int = 0  # seeds that reached the target
    diverged: int = 0  # seeds whose loss became NaN, infinite, or over three times the initial one
    edge: bool = False  # the best rate is the lowest or highest one tried: a better one may lie beyond
    rates: tuple[RateSteps, ...] = ()  # every rate tried, ascending


@dataclass(frozen=True)
class StepsFit:
    """Steps to target against batch size: a fitted model with its critical batches. Intervals are 95 %.

    A bound of None is open. Where no batch tested bends the curve, `critical_batch` is None and `low` bounds it; where
    steps do not fall at all, `high` does.
    """

    model: str | None  # None: too few batches reached the target for a fit
    s_min: float | None  # fewest steps, however large the batch
    critical_batch: float | None  # B_50: twice the fewest examples
    low: float | None
    high: float | None
    b20: float | None  # 1.2 times the fewest examples
    b50: float | None
    b_stag: float | None  # doubling it saves less than 10 % of the steps
    s_min_low: float | None = None
    s_min_high: float | None = None
    b20_low: float | None = None
    b20_high: float | None = None
    b_stag_low: float | None = None
    b_stag_high: float | None = None
    regimes: tuple[tuple[int, str], ...] = ()  # by the model: linear, diminishing, stagnant, undetermined
    measured_regimes: tuple[tuple[int, str], ...] = ()  # from the steps saved by doubling, without a model
    parameters: dict[str, float] = field(default_factory=dict)  # of the model, see `steps_model`
    candidates: dict[str, float] = field(default_factory=dict)  # AICc of every model tried, above the best
    rms_log_error: float | None = None  # root mean square of ln(measured / fitted) over the cells that reached
    batches: int = 0  # batch sizes that reached the target
    seeds: int = 0
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Curve:
    """Steps to target against batch size for one learning-rate rule and one split."""

    rule: str
    split: Literal["train", "test"]
    points: tuple[ConvergencePoint, ...]
    s_min: float | None
    critical_batch: float | None  # B_50: twice the fewest examples
    low: float | None
    high: float | None
    target: float | None = None
    regimes: tuple[tuple[int, str], ...] = ()
    fit: StepsFit | None = None
    cap: int | None = None  # steps after which a trial of this curve was given up, where all batches share one
    noise_ratio: float | None = None  # B_simple over this critical batch
    noise_ratio_low: float | None = None
    noise_ratio_high: float | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class BranchPoint:
    """Branches of one batch size from one checkpoint, repeat by repeat; None where the loss became NaN or infinite."""

    batch: int
    learning_rate: float
    losses: tuple[float | None, ...]  # smoothed, at the end of the window
    steps: tuple[float | None, ...]  # to the level; None too where it was not reached in the window


@dataclass(frozen=True)
class Branching:
    """The critical batch at one point of a run, from branches that take the same examples in other batch sizes."""

    step: int  # of the base run
    loss: float | None  # train loss at the checkpoint
    base_batch: int
    window: int  # examples each branch is trained on
    level: float | None  # train loss whose steps are counted: that of the base branch a quarter into the window
    tolerance: float  # share of the base branch's last loss
    points: tuple[BranchPoint, ...]
    largest: int | None  # largest batch whose last loss is within the tolerance of the base branch's
    largest_low: int | None
    largest_high: int | None  # None: the largest batch tested is within it
    fit: StepsFit | None = None  # of the steps to the level: the critical batch here
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Convergence:
    """Steps to target against batch size, measured by training."""

    curves: tuple[Curve, ...]
    notes: tuple[Note, ...] = ()
    optimizer: str | None = None
    seeds: int | None = None
    trials: int | None = None  # training runs behind the curves
    base_batch: int | None = None  # B_0, whose tuned rate the fixed rules start from
    smoothing: str | None = None  # how the train loss was smoothed, and on what the test loss was taken
    complete: bool = True  # False: stopped before every trial had run
    branches: tuple[Branching, ...] = ()  # along one run, by step
    device: Device | None = field(default=None, metadata=_TOP)
    workload: WorkloadInfo | None = field(default=None, metadata=_TOP)


@dataclass(frozen=True)
class Reason:
    """How a figure of the verdict came about."""

    figure: str
    text: str  # one sentence
    evidence: Evidence
    inputs: dict[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontierPoint:
    """One number of devices at its best batch, against one device at its own: modelled."""

    devices: int
    batch: int  # examples per update, over all devices
    time_factor: float
    cost_factor: float  # device-seconds
    energy_factor: float | None = None  # None: energy was not measured at these batches


@dataclass(frozen=True)
class AccumulationPlan:
    """How a global batch is put together: devices x accumulation x micro_batch."""

    global_batch: int
    devices: int
    micro_batch: int  # examples in one pass on one device
    accumulation: int  # passes before an update
    step_s: float | None  # modelled seconds per update, without communication; None: no throughput fit


@dataclass(frozen=True)
class Verdict:
    """The answer. Every number in `text` stands in a field, and `why(field)` says how it came about."""

    critical_batch: float | None
    critical_low: float | None
    critical_high: float | None
    critical_source: str | None  # "noise" < "branch" < "sweep": the evidence it stands on
    saturation_batch: float | None
    best_batch: int | None
    best_low: float | None
    best_high: float | None
    limit: Limit
    useful_devices: int | None
    time_to_target: float | None  # seconds on this device at best_batch
    text: str
    reasons: tuple[Reason, ...] = ()
    notes: tuple[Note, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()  # 1, 2, 4, ... devices

    def __str__(self) -> str:
        return self.text

    def why(self, figure: str) -> Reason:
        """The sentence and the figures behind one field of the verdict."""
        for reason in self.reasons:
            if reason.figure == figure:
                return reason
        known = ", ".join(reason.figure for reason in self.reasons)
        raise UsageError(f"no figure {figure!r} in this verdict. Ask for one of: {known}.")

    def to_json(self) -> str:
        """This verdict alone as JSON; the whole run is `Run.to_json`."""
        return json.dumps(to_dict(self), indent=2)


@dataclass(frozen=True)
class Run:
    """One saved run: the whole record of DESIGN, as written by `pybatch bench -o`."""

    created: str  # ISO 8601, UTC
    environment: Environment | None  # None: put together from results that were not saved as a run
    capacity: Capacity | None = None
    noise: NoiseScale | None = None
    convergence: Convergence | None = None
    verdict: Verdict | None = None
    complete: bool = True
    notes: tuple[Note, ...] = ()
    distributed: Distributed | None = None
    trajectory: NoiseTrajectory | None = None  # of a training run, see pybatch.noise.Trajectory

    def to_json(self) -> str:
        """The record as JSON text; non-finite numbers become null."""
        return json.dumps(to_dict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Run:
        """Read a saved record back; raises UsageError on a foreign file or another schema version."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"not a pybatch record: {error}. Give a file written by 'pybatch bench -o'.") from None
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise UsageError(
                f"record has schema {found!r}, this pybatch reads {SCHEMA!r}. Run the measurement again, "
                "or read it with the pybatch version named in its environment."
            )
        return _run_from_dict(data)


def _hoisted(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.metadata.get("json") == "top")


_HOISTED = _hoisted(Capacity)
_HOISTED_BY = {"capacity": _HOISTED, "convergence": _hoisted(Convergence)}


def to_dict(record: Any) -> Any:
    """A record as plain JSON types, in the order of the schema."""
    if not isinstance(record, Run):
        return encode(record)
    body = encode(record)
    head = {"schema": SCHEMA, "created": body.pop("created"), "environment": body.pop("environment")}
    source = record.convergence if record.capacity is None else record.capacity
    return head | {name: encode(getattr(source, name, None)) for name in _HOISTED} | body


def _run_from_dict(data: dict[str, Any]) -> Run:
    for section, names in _HOISTED_BY.items():
        if isinstance(data.get(section), dict):
            data = data | {section: data[section] | {name: data[name] for name in names if name in data}}
            break  # the first one was written there
    run: Run = decode(Run, {k: v for k, v in data.items() if k != "schema" and k not in _HOISTED}, "record")
    return run
