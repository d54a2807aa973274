"""How a wanted global batch is put together: devices x passes x examples of a pass. And what of it a record knows."""

from __future__ import annotations

import math

from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.base.numerals import count, counted
from pybatch.base.plain import given, said
from pybatch.records import AccumulationPlan, Capacity, Run

MOST_EXAMPLES = 2**40  # in a global batch
MOST_DEVICES = 2**20
_LOOK = 64  # shares to either side that are tried for a nearer exact choice


@typed
def plan_accumulation(
    capacity: Capacity | None, global_batch: int, devices: int = 1, *, largest: int | None = None
) -> AccumulationPlan:
    """Micro-batch and accumulation steps for a global batch: the fewest passes that fit, as equal as possible.

    Past memory, gradients of several micro-batches are summed before an update. Larger micro-batches are never slower
    per example by the throughput fit, so the largest that fits is taken.

    Args:
        capacity: of one device; its largest batch bounds the micro-batch. None: `largest` alone does.
        global_batch: examples per update, over all devices.
        devices: that share the batch equally.
        largest: examples of a micro-batch at most, in place of the capacity's largest batch.

    Raises:
        UsageError: the batch does not divide over devices or into passes: the message has the nearest that do. Or the
            largest batch is not known.
    """
    if capacity is not None and not isinstance(capacity, Capacity):
        raise UsageError(
            f"plan_accumulation(): capacity is {given(capacity)}. Give a run's .capacity, or None and largest=."
        )
    if not 1 <= global_batch <= MOST_EXAMPLES or not 1 <= devices <= MOST_DEVICES:
        raise UsageError(
            f"global batch {said(global_batch)} on {said(devices)} devices: both must be at least 1, the batch at most "
            f"{MOST_EXAMPLES:,} examples and the devices at most {MOST_DEVICES:,}."
        )
    if largest is None and (capacity is None or capacity.max_batch is None):
        raise UsageError(
            "the largest batch that fits was not measured, so no micro-batch can be chosen. Measure it, or give the "
            "largest micro-batch (largest=, --largest)."
        )
    if largest is not None and largest < 1:
        raise UsageError(f"largest micro-batch {said(largest)} holds no example. Give 1 or more.")
    most = largest if largest is not None else (capacity.max_batch if capacity is not None else None)
    assert most is not None
    global_batch, devices, most = int(global_batch), int(devices), int(most)  # a tensor would make the plan's
    share, rest = divmod(global_batch, devices)
    passes = _passes(share, most) if not rest else None
    if passes is None:
        why = (
            f"divide over {devices} devices"
            if rest
            else f"divide into equal micro-batches of at most {most} on {counted(devices, 'device')} "
            "without twice the passes"
        )
        near = " or ".join(map(str, nearest(global_batch, devices, most)))
        raise UsageError(f"global batch {global_batch} does not {why}. Use {near}.")
    micro = share // passes
    fit = capacity.model if capacity is not None else None
    step_s = passes * fit.step_s(micro) if fit is not None else None
    return AccumulationPlan(global_batch, devices, micro, passes, step_s)


def nearest(global_batch: int, devices: int, largest: int) -> tuple[int, ...]:
    """The global batches below and above one that divide over the devices and into equal micro-batches; ascending."""
    share, rest = divmod(global_batch, devices)
    found = []
    for first, way in ((share if rest else share - 1, -1), (share + 1, 1)):
        tried = (first + way * i for i in range(_LOOK))
        exact = next((s for s in tried if s >= 1 and _passes(s, largest) is not None), None)
        if exact is None and first >= 1:  # a multiple of the fewest passes is one
            fewest = _fewest(first, largest)
            exact = fewest * (first // fewest if way < 0 else -(-first // fewest))
        if exact:
            found.append(exact * devices)
    return tuple(found)


def of_record(run: Run, devices: int | None = None) -> tuple[int, int]:
    """Global batch and devices that a record advises: (batch of an update over all devices, devices).

    Args:
        run: with a verdict.
        devices: those there are; None: as many of 1, 2, 4, ... as are worth it.

    Raises:
        UsageError: the record advises no batch.
    """
    verdict = run.verdict
    if verdict is None or verdict.best_batch is None:
        raise UsageError("the record advises no batch size: it has no verdict on one. Give --global-batch.")
    points = {point.devices: point.batch for point in verdict.frontier}
    if devices is None:
        devices = max((k for k in points if k <= (verdict.useful_devices or 1)), default=1)
    if devices == 1 or not points:
        return verdict.best_batch, devices
    return points[max(k for k in points if k <= devices)], devices


def exact(global_batch: int, devices: int, largest: int) -> int:
    """The batch itself where it can be put together exactly, else the nearest that can: for one that was advised."""
    share, rest = divmod(global_batch, devices)
    if not rest and _passes(share, largest) is not None:
        return global_batch
    return min(nearest(global_batch, devices, largest), key=lambda batch: (abs(math.log(batch / global_batch)), batch))


def sentence(plan: AccumulationPlan, unit: str = "examples") -> str:
    """The plan in words."""
    passes = counted(plan.accumulation, "pass", "passes")
    parts = [f"{count(plan.micro_batch)} {unit}", passes, counted(plan.devices, "device")]
    time = f"; about {1e3 * plan.step_s:.3g} ms an update, modelled" if plan.step_s is not None else ""
    alone = ", without communication" if time and plan.devices > 1 else ""
    return f"{count(plan.global_batch)} = {' × '.join(parts)}{time}{alone}"


def _fewest(share: int, largest: int) -> int:
    return -(-share // largest)


def _passes(share: int, largest: int) -> int | None:
    """The least number of equal passes of at most so many examples; None where that is over twice the fewest."""
    fewest = _fewest(share, largest)
    if share < 1:
        return None
    if fewest <= share // fewest:
        return next((k for k in range(fewest, 2 * fewest + 1) if share % k == 0), None)
    least = -(-share // (2 * fewest))
    micro = next((m for m in range(share // fewest, max(1, least) - 1, -1) if share % m == 0), None)
    return share // micro if micro is not None else None
