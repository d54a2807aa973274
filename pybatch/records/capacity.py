"""Records of throughput, memory and communication against batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pybatch.base import numerals as n
from pybatch.base.codec import TOP
from pybatch.base.display import Shown
from pybatch.records.figure import Figure, figure
from pybatch.records.input import InputPipeline
from pybatch.records.subject import Ceilings, Device, Note, WorkloadInfo

BatchStatus = Literal["ok", "oom", "predicted_oom", "skipped"]
StepMode = Literal["eager", "compiled", "graph", "compiled, graph"]
StepLimit = Literal["host", "launch", "memory", "tensor", "compute", "power", "input"]
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the samples kept in a record


def _hidden(label: str, unit: str = "", **more: Any) -> Any:
    """A figure of the record that its table does not show."""
    return field(default=None, metadata=figure(label, unit, **{"shown": False} | more))


def _share(label: str, **more: Any) -> Any:
    return _hidden(label, form=n.share, **more)


def _flops(value: float | None) -> str:
    return n.rate(value, "FLOP")


@dataclass(frozen=True)
class BatchPoint:
    """One batch size: a full training step (forward, backward, update) on a batch already on the device."""

    batch: int = field(metadata=figure("batch", form=n.count))
    status: BatchStatus = field(metadata=figure("status", form=n.words, within="samples_per_s"))
    # Median over samples.
    step_ms: float | None = field(default=None, metadata=figure("step", "ms", interval=("step_ms_low", "step_ms_high")))
    step_ms_low: float | None = field(default=None, metadata=figure("low", within="step_ms"))  # 95 % of the median
    step_ms_high: float | None = field(default=None, metadata=figure("high", within="step_ms"))
    samples_per_s: float | None = field(
        default=None,
        metadata=figure(
            "{examples}/s",
            form=n.rounded,
            instead=lambda point: point.lost,
            beside=(Figure("ceiling", form=n.share, of=lambda point, capacity: point.of_ceiling(capacity)),),
        ),
    )
    # Share of the step the device waits for the host, 0..1.
    host_bound: float | None = _share("waiting for the host", group="utilization")
    model_flops: float | None = _hidden("FLOP per step", form=_flops)  # forward + backward, recomputation excluded
    mfu_measured: float | None = _share(  # model FLOP/s over ceilings.gemm_flops
        "MFU", full="MFU, of the measured matrix product", shown=True, group="utilization"
    )
    mfu_datasheet: float | None = _share("MFU, of the datasheet", group="utilization")
    sm_active: float | None = _share("SM active", group="utilization")
    sm_occupancy: float | None = _share("SM occupancy", group="utilization")
    tensor_active: float | None = _share("tensor cores active", group="utilization")
    dram_active: float | None = _share("DRAM bandwidth", group="utilization")
    # CPU runs: share of the usable cores kept busy, 0..1.
    cpu_active: float | None = _share("CPU active", group="utilization")
    memory_bytes: int | None = field(default=None, metadata=figure("memory", form=n.memory))  # peak during a step
    joules_per_sample: float | None = _hidden("J per example")
    sm_clock_mhz: float | None = _hidden("SM clock", "MHz")
    throttled: bool | None = _hidden("throttled", form=n.yes_no)  # at some look
    samples: int = field(default=0, metadata=figure("steps timed", form=n.count, shown=False))
    blocks_ms: tuple[float, ...] = ()  # medians of up to 20 runs of successive steps, which the fit resamples
    block_rounds: tuple[int, ...] = ()  # the round over all batch sizes that each block was timed in
    steady: bool | None = _hidden("steady", form=n.yes_no)  # no: the time ended before its median was
    reason: str | None = None  # why status is not ok
    burst_step_ms: float | None = _hidden("burst step", "ms")  # median of the first 100 steps after a rest
    eager_step_ms: float | None = _hidden("eager step", "ms")  # with CUDA graphs: launched kernel by kernel
    launch_overhead_ms: float | None = _hidden("launching", "ms")  # eager_step_ms - step_ms
    compile_s: float | None = _hidden("compiling", "s")  # with torch.compile: not part of any step time
    step_bytes: int | None = _hidden("bytes moved", form=n.memory)  # by operators and update, as if nothing were cached
    mbu_measured: float | None = _share("MBU")  # step_bytes / step time over ceilings.copy_bytes_per_s
    # The power limit lowered the clock, at some look.
    power_capped: bool | None = _hidden("power capped", form=n.yes_no)
    bound_by: StepLimit | None = field(default=None, metadata=figure("bound", form=n.plain))  # most limits this step
    bound_why: str | None = None  # the figures behind bound_by, or why it is null
    step_ms_quantiles: tuple[float, ...] = ()  # of the samples, at QUANTILES; empty: not kept
    throttled_share: float | None = _share("looks throttled")  # at the clock, spread over the steady steps
    power_capped_share: float | None = _share("looks power capped")
    energy_window_s: float | None = _hidden("energy window", "s")  # of continuous steps, for joules_per_sample

    @property
    def lost(self) -> str | None:
        """Why there are no figures of this batch, in a word or two; None where it ran."""
        return None if self.status == "ok" else n.words(self.status)

    def of_ceiling(self, capacity: Capacity | None) -> float | None:
        """Throughput over the fitted ceiling."""
        ceiling = capacity.ceiling_samples_per_s if capacity is not None else None
        return self.samples_per_s / ceiling if self.samples_per_s and ceiling else None


@dataclass(frozen=True)
class Anchor:
    """One batch size timed first and once more at the end: what changed on the device meanwhile."""

    batch: int
    start_ms: tuple[float, ...]  # of the first visit's step times, at QUANTILES
    end_ms: tuple[float, ...]  # of the last visit's


@dataclass(frozen=True)
class ThroughputFit(Shown):
    """Step time against batch size, seconds: t(B) = alpha + beta B, max(floor, alpha + beta B), or in waves.

    Intervals are 95 % by bootstrap over the measured steps. Where step times do not rise with the batch, no ceiling is
    in sight: `ceiling`, `half_batch` and `saturation_batch` are None, their lower ends bound them, and `beta_s` is 0.
    Where they are proportional to it from the smallest batch on, `half_batch` and `saturation_batch` are None, their
    upper ends bound them, and `alpha_s` is 0. Where doublings gain on beyond what any shape here allows,
    `saturation_batch` alone is None, and ends are open. A note says so.
    """

    model: Literal["affine", "floor", "wave"]
    t0_s: float  # alpha (affine), or the floor: time of a vanishing batch
    alpha_s: float
    beta_s: float  # seconds per example
    ceiling: float | None  # examples/s as B grows: 1 / beta; None: not in sight
    ceiling_low: float
    ceiling_high: float | None  # None: the batches measured show no upper end
    half_batch: float | None  # batch at half the ceiling: alpha / beta for the affine model
    half_low: float
    half_high: float | None
    saturation_batch: float | None  # doubling it gains less than `gain`
    saturation_low: float
    saturation_high: float | None
    gain: float  # 0.05
    rms_log_error: float  # root mean square of ln(measured / fitted)
    batches: int  # batch sizes fitted
    wave: int | None = None  # examples the device takes at once: t = alpha + beta wave ceil(B / wave)
    notes: tuple[Note, ...] = ()  # on figures of this fit, by their names here

    def step_s(self, batch: float) -> float:
        """Modelled seconds per step at this batch size."""
        if self.wave is not None:
            batch = self.wave * math.ceil(batch / self.wave)
        time = self.alpha_s + self.beta_s * batch
        return max(self.t0_s, time) if self.model == "floor" else time


SATURATED = 0.95  # of the ceiling: a measured batch that reaches this saturates the device


@dataclass(frozen=True)
class Capacity(Shown):
    """What the device does with this workload at each batch size, and where its ceiling is."""

    t0_ms: float | None
    ceiling_samples_per_s: float | None = field(
        metadata=figure("ceiling", "{examples}/s", n.count, interval=("model.ceiling_low", "model.ceiling_high"))
    )
    half_batch: float | None = field(metadata=figure("half batch", interval=("model.half_low", "model.half_high")))
    # Modelled: a doubling past it gains < 5 %.
    saturation_batch: float | None = field(
        metadata=figure("saturation", interval=("saturation_low", "saturation_high"))
    )
    saturation_low: float | None
    saturation_high: float | None
    saturation_measured: int | None  # smallest measured batch whose interval reaches 95 % of the ceiling
    max_batch: int | None = field(metadata=figure("largest fit", form=n.count))  # the largest batch that fits in memory
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
    input: InputPipeline | None = None  # of the workload's DataLoader; None: it has none, or see the notes
    disturbed: tuple[str, ...] = ()  # what else the machine was doing meanwhile, with its figures; empty: nothing seen

    @property
    def standing(self) -> tuple[BatchPoint, ...]:
        """Batch sizes that a continued run need not measure again: all of a complete run, else the steady ones."""
        return tuple(p for p in self.batches if self.complete or (p.status == "ok" and p.steady))


@dataclass(frozen=True)
class DistributedPoint:
    """A data-parallel step on several devices, each with its own share of the batch."""

    devices: int = field(metadata=figure("devices", form=n.count))
    batch: int = field(metadata=figure("batch each", form=n.count))  # examples per device
    # Median, of the same steps without communication, on all devices at once.
    compute_ms: float = field(metadata=figure("compute", "ms"))
    step_ms: float = field(  # median, of the slowest device in each step
        metadata=figure(
            "step",
            "ms",
            interval=("step_ms_low", "step_ms_high"),
            beside=(Figure("efficiency", form=n.share, of=lambda point, _: point.compute_ms / point.step_ms),),
        )
    )
    step_ms_low: float | None = field(default=None, metadata=figure("low", within="step_ms"))
    step_ms_high: float | None = field(default=None, metadata=figure("high", within="step_ms"))


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
