"""What most limits a step, from figures that were measured: the host, launches, memory, the arithmetic units, power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pybatch.base import numerals as n
from pybatch.records import BatchPoint, StepLimit, ThroughputFit

WAITING = 0.3  # of the step: without it throughput would grow 1.4-fold
NEAR = 0.6  # of a roof: from there on Nsight Compute's guide, too, calls a kernel bound by that unit, below by latency
OVER = 1.25  # of a roof: beyond it the roof is not one of this work, and bounds nothing
CAPPED = 0.5  # of the looks at the clock: most of the steady region
FIXED = 0.5  # of the step, independent of the batch: the batch's own work is then the smaller part
OUT_OF_CACHE = 4  # times the last-level cache that a step must touch, before operators' bytes are taken for memory's


@dataclass(frozen=True)
class Place:
    """What of the device and the workload decides how figures are read."""

    kind: Literal["cpu", "cuda"]
    dtype: str
    cache_bytes: int  # last level


def bound(point: BatchPoint, place: Place, fit: ThroughputFit | None = None) -> tuple[StepLimit | None, str]:
    """The limit of a timed batch size and the figures it stands on; None and why, where they do not decide.

    In this order: work that waits for the host (its launches, where a CUDA graph shows them apart) is not limited by
    the device at all; a clock lowered for power most of the time limits whatever else is near its roof; then the roof
    that the step comes nearest to, of memory and arithmetic. On a CPU, a step far from both whose time hardly depends
    on the batch is bound by the host: the fixed cost of each operator.
    """
    if point.step_ms is None:
        return None, "not timed"
    if point.launch_overhead_ms is not None and point.eager_step_ms:
        saved = point.launch_overhead_ms / point.eager_step_ms
        if saved >= WAITING:
            return "launch", (
                f"replayed as a CUDA graph the step takes {n.number(point.step_ms)} ms, launched kernel by kernel "
                f"{n.number(point.eager_step_ms)} ms: {n.share(saved)} of that is launching"
            )
    if point.host_bound is not None and point.host_bound >= WAITING:
        part = "" if point.launch_overhead_ms is not None else "; --cuda-graph tells what of that is launching"
        return "host", f"the device waits for the host during {n.share(point.host_bound)} of the step{part}"
    capped = point.power_capped_share
    lowered = "" if capped is None else f"the power limit lowered the clock at {n.share(capped)} of the looks at it"
    if capped is not None and capped > CAPPED:
        return "power", f"{lowered}, and the device does not wait for the host"
    roofs = _roofs(point, place)
    if roofs:
        share, limit, what = max(roofs)
        if share >= NEAR:
            return limit, f"{what} {n.share(share)}"
    seen = "; ".join(f"{what} {n.share(share)}" for share, _, what in roofs) or "no roof to compare with was measured"
    fixed = fit.step_s(0) / fit.step_s(point.batch) if fit is not None else None
    if place.kind == "cpu" and fixed is not None and fixed >= FIXED and _both_known(point):
        return "host", f"{n.share(fixed)} of the step is independent of the batch; {seen}"
    seen += f"; {lowered}" if capped else ""
    return None, f"no limit is near ({n.share(NEAR)} of a roof, or {n.share(WAITING)} waiting): {seen}"


def with_bounds(points: Sequence[BatchPoint], place: Place, fit: ThroughputFit | None) -> list[BatchPoint]:
    """The points with `bound_by` and `bound_why` filled in where they were timed."""
    found = []
    for point in points:
        if point.status == "ok":
            limit, why = bound(point, place, fit)
            point = replace(point, bound_by=limit, bound_why=why)
        found.append(point)
    return found


def _roofs(point: BatchPoint, place: Place) -> list[tuple[float, StepLimit, str]]:
    """Shares of roofs that are known: (share, the limit it stands for, in words). Counters before counts."""
    arithmetic: StepLimit = "tensor" if place.kind == "cuda" and place.dtype != "fp32" else "compute"
    found: list[tuple[float, StepLimit, str]] = []
    if point.tensor_active is not None:
        found.append((point.tensor_active, "tensor", "tensor cores active"))
    if point.mfu_measured is not None and point.mfu_measured <= OVER:
        found.append((point.mfu_measured, arithmetic, "FLOP/s of the measured matrix product"))
    if point.dram_active is not None:
        found.append((point.dram_active, "memory", "memory bandwidth in use"))
    elif point.mbu_measured is not None:
        # Above 1 the bytes cannot all have come from memory; of a small working set none need have.
        large = (point.memory_bytes or 0) >= OUT_OF_CACHE * place.cache_bytes
        if point.mbu_measured < NEAR or large:
            found.append((point.mbu_measured, "memory", "bytes/s of the measured copy"))
    return found


def _both_known(point: BatchPoint) -> bool:
    computes, moves = point.mfu_measured, point.mbu_measured
    return computes is not None and computes <= OVER and moves is not None and moves < NEAR


def undecided(points: Sequence[BatchPoint]) -> str:
    """A note's text on the batch sizes without a limit."""
    lacking = [str(p.batch) for p in points if p.status == "ok" and p.bound_by is None]
    near = f"{n.share(NEAR)} of a roof, or {n.share(WAITING)} of the step waiting for the host"
    return f"nothing is near a limit ({near}) at batch {', '.join(lacking)}"
