"""Records of throughput, memory and communication against batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pybatch.base.display import Shown
from pybatch.records.subject import TOP, Ceilings, Device, Note, WorkloadInfo

BatchStatus = Literal["ok", "oom", "predicted_oom", "skipped"]
StepMode = Literal["eager", "compiled", "graph", "compiled, graph"]
StepLimit = Literal["host", "launch", "memory", "tensor", "compute", "power"]
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the samples kept in a record


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
    throttled: bool | None = None  # at some look
    samples: int = 0  # steps timed
    blocks_ms: tuple[float, ...] = ()  # medians of up to 20 runs of successive steps, which the fit resamples
    block_rounds: tuple[int, ...] = ()  # the round over all batch sizes that each block was timed in
    steady: bool | None = None  # False: the time ended before the stopping rule was met
    reason: str | None = None  # why status is not ok
    burst_step_ms: float | None = None  # median of the first 100 steps after a rest; step_ms is the sustained one
    eager_step_ms: float | None = None  # with CUDA graphs: the same step launched kernel by kernel
    launch_overhead_ms: float | None = None  # eager_step_ms - step_ms
    compile_s: float | None = None  # with torch.compile: not part of any step time
    step_bytes: int | None = None  # read and written by the operators and the update, as if nothing stayed in caches
    mbu_measured: float | None = None  # step_bytes / step time over ceilings.copy_bytes_per_s
    power_capped: bool | None = None  # the power limit lowered the clock, at some look
    bound_by: StepLimit | None = None  # what most limits this step
    bound_why: str | None = None  # the figures behind bound_by, or why it is null
    step_ms_quantiles: tuple[float, ...] = ()  # of the samples, at QUANTILES; empty: not kept
    throttled_share: float | None = None  # of the looks at the clock, spread over the steady steps, 0..1
    power_capped_share: float | None = None
    energy_window_s: float | None = None  # of continuous steps, that joules_per_sample is taken over


@dataclass(frozen=True)
class Anchor:
    """One batch size timed first and once more at the end: what changed on the device meanwhile."""

    batch: int
    start_ms: tuple[float, ...]  # of the first visit's step times, at QUANTILES
    end_ms: tuple[float, ...]  # of the last visit's


@dataclass(frozen=True)
class ThroughputFit(Shown):
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
class Capacity(Shown):
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
    mode: StepMode = "eager"  # how the steps were run; memory and FLOPs are those of eager steps, but for "compiled"
    notes: tuple[Note, ...] = ()
    device: Device | None = field(default=None, metadata=TOP)
    ceilings: Ceilings | None = field(default=None, metadata=TOP)
    workload: WorkloadInfo | None = field(default=None, metadata=TOP)
    batches: tuple[BatchPoint, ...] = field(default=(), metadata=TOP)
    anchor: Anchor | None = None  # what `drift` is taken from

    @property
    def standing(self) -> tuple[BatchPoint, ...]:
        """Batch sizes that a continued run need not measure again: all of a complete run, else the steady ones."""
        return tuple(p for p in self.batches if self.complete or (p.status == "ok" and p.steady))


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
