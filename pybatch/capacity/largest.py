"""The largest batch that fits: predicted from how peak memory grows, then run in a fresh process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pybatch.base import numerals
from pybatch.base.errors import WorkloadError
from pybatch.capacity.exploration import Explorer
from pybatch.capacity.probe import Outcome, Request, run_probe
from pybatch.device import memory
from pybatch.fits.memory import MemoryGrowth, fit_memory
from pybatch.records import Note
from pybatch.workloads.running.packing import Packed, pack

GPU_SHARE = 0.90  # of free GPU memory: fragmentation and the library's workspaces take the rest
CPU_SHARE = 0.50  # of available host memory, which other processes need as well
_MARGIN = 0.97  # of the limit aimed at, so that the prediction's own error does not decide
_STEP_LIMIT = 10.0  # seconds; a longer step is not run for verification
_START_S = 5.0  # seconds to start a process, import torch and make the session, at most
_FRESH_BYTES = 128 << 20  # above every allocator's threshold: such memory is fresh from the system
_TRIES = 4
_OFF = 0.10  # more than predicted: so much an allocator and the libraries may add
_FAR = 8  # times the largest batch that ran: a prediction beyond is said to be far
_SPARE = 1.2  # the time of the largest batch is estimated from small ones
_SHARE = 0.50  # of the time that is left, at most, for verifying the largest batch
_CHECK_SHARE = 0.25  # for checking the prediction by a smaller one, where the largest takes too long


@dataclass(frozen=True)
class Largest:
    """The largest batch that fits; `verified` where a full step of it ran in a fresh process."""

    batch: int | None
    verified: bool | None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """A batch predicted to be the largest that fits, and how it would be verified."""

    candidate: int
    fits: int  # the largest batch that has run
    packed: Packed
    notes: tuple[Note, ...]


def memory_limit(device: torch.device) -> int:
    """Bytes a training run may take: 90 % of free GPU memory, or 50 % of available host memory."""
    share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    return int(share * memory.available_bytes(device))


def limit_text(device: torch.device, limit: int) -> str:
    """The limit as a reader should know it."""
    of = f"{GPU_SHARE:.0%} of free GPU memory" if device.type == "cuda" else f"{CPU_SHARE:.0%} of available host memory"
    return f"{limit / 2**30:.3g} GiB, {of}"


def predict_largest(explorer: Explorer, limit: int, deadline: float) -> Prediction | Largest:
    """Predict the largest batch within `limit` bytes; a `Largest` without a batch where that is not possible.

    Args:
        explorer: with its looks at small batches; looks at further ones where memory does not yet clearly grow.
        limit: bytes, above what the process held before the session.
        deadline: of the explorer's clock; at most a quarter of the time until then is used.
    """
    session = explorer.step.session
    basis = Note("capacity.max_batch", f"memory limit {limit_text(session.device, limit)}")
    if explorer.memory.reason is not None:
        return _null(explorer.memory.reason)
    _extend(explorer, deadline)
    growth = explorer.memory_growth()
    fits = explorer.working[-1].batch
    failures = [look for look in explorer.looks.values() if look.status in ("oom", "skipped") and not look.late]
    refused = [look.batch for look in failures if look.batch > fits]
    if refused:
        basis = Note("capacity.max_batch", f"below batch {min(refused)}, which does not run; {basis.text}")
    if growth is None and refused:
        return Largest(fits, True, (basis, Note("capacity.max_batch_verified", f"batch {fits} was the largest to run")))
    if growth is None:
        seen = [look.batch for look in explorer.working]
        return _null(f"peak memory does not clearly grow over batches {min(seen)}..{max(seen)}", basis)
    try:
        packed = pack(session.workload)
    except WorkloadError as error:
        return _null(str(error), basis)
    predicted = max(fits, growth.largest(limit * _MARGIN))
    notes = (basis, *_off_line(growth, predicted, fits, limit))
    return Prediction(min([predicted, *(n - 1 for n in refused)]), fits, packed, notes)


def _off_line(growth: MemoryGrowth, predicted: int, fits: int, limit: int) -> tuple[Note, ...]:
    """Where the peaks are off a line: what a quadratic predicts instead, or that it explains them no better."""
    far = numerals.number(predicted / fits, 2)
    on_line = max(fits, replace(growth, square=None).largest(limit * _MARGIN))
    if growth.square is not None:
        text = (
            f"peak memory bends upward over batches up to {fits}, more than an allocator's steps do: a quadratic "
            f"predicts {predicted}, {far} times the largest that ran; a line would say {on_line}"
        )
    elif growth.unexplained is not None:
        text = (
            f"neither a line nor a quadratic explains peak memory over batches up to {fits}: about a line it spreads "
            f"over {growth.unexplained / 2**20:.3g} MiB, and the line predicts {far} times further"
        )
    else:
        return ()
    return (Note("capacity.max_batch", text),)


def needed_s(explorer: Explorer, batch: int, size: float) -> float:
    """Seconds that running a batch of `size` bytes takes at most; infinity where a step is too long to be worth it."""
    expected = explorer.predicted_s(batch)
    if expected > _STEP_LIMIT:
        return math.inf
    pages = size / _fresh_bytes_per_s() if explorer.step.session.device.type == "cpu" else 0.0
    return _START_S + expected + pages


@functools.cache
def _fresh_bytes_per_s() -> float:
    """Rate at which the system hands out fresh pages, best of three: virtual machines differ by an order."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.empty(_FRESH_BYTES, dtype=torch.uint8).fill_(1)
        seconds.append(time.perf_counter() - start)
    return _FRESH_BYTES / min(seconds)


def reserve_s(explorer: Explorer, prediction: Prediction, limit: int, left: float) -> float:
    """Seconds to set aside of those left for `verify_largest`: none where they would not suffice."""
    needed = needed_s(explorer, prediction.candidate, limit) * _SPARE
    if needed <= _SHARE * left:
        return needed
    share = _CHECK_SHARE * left
    return share if _affordable(explorer, prediction, share) is not None else 0.0


def _affordable(explorer: Explorer, prediction: Prediction, left: float) -> int | None:
    """The largest batch, well above what has run, that can be run in a fresh process in the time left."""
    growth, batch = explorer.memory_growth(), prediction.candidate // 2
    while growth is not None and batch >= 2 * prediction.fits:
        if needed_s(explorer, batch, growth.peak(batch)) <= left:
            return batch
        batch = batch * 3 // 4
    return None


def verify_largest(
    explorer: Explorer,
    prediction: Prediction,
    limit: int,
    deadline: float,
    probe: Callable[[Request, float], Outcome] | None = None,
) -> Largest:
    """Run a prediction's batch in a fresh process before `deadline`; where it does not fit, a smaller one.

    Where a step of it takes too long, it stays unverified, but the prediction is checked by the largest batch there is
    time for. `probe` runs a request within so many seconds; a test may replace it.
    """
    session, candidate, fits, reason = explorer.step.session, prediction.candidate, prediction.fits, ""
    probe = probe or run_probe
    explorer.step.clear()
    memory.release(session.device)
    for attempt in range(_TRIES):
        needed, left = needed_s(explorer, candidate, limit), deadline - explorer.clock.now()
        if needed > left:
            step = f"a step of it takes about {explorer.predicted_s(candidate):.2g} s"
            check = f"{step}, the check {needed:.2g} s; {max(0.0, left):.2g} s were left"
            cause = f"{step}; none above {_STEP_LIMIT:g} s is run" if math.isinf(needed) else check
            if not reason:
                said, candidate = _prediction_checked(explorer, prediction, limit, left, probe)
                cause += said
            reason = f"{reason}; {cause}" if reason else cause
            break
        outcome = probe(_request(explorer, prediction, candidate, limit, left), left)
        if outcome.status == "ok":
            steps = "1 full step" if outcome.steps == 1 else f"{outcome.steps} full steps"
            ran = f"{steps} of batch {candidate} ran in a fresh process"
            return Largest(candidate, True, (*prediction.notes, Note("capacity.max_batch_verified", ran)))
        reason = f"batch {candidate} did not run in a fresh process ({outcome.reason})"
        if outcome.status != "oom" or candidate == fits:
            break
        # The prediction is nearly right as a rule: step back a little first, then halve the way to what has run, or
        # take what bends in it.
        less = int(candidate * 0.9) if attempt == 0 else min((fits + candidate) // 2, _bent(explorer, limit))
        candidate = max(fits, less)
    growth = explorer.memory_growth()
    if growth is not None and candidate > _FAR * fits:
        far = numerals.number(candidate / fits, 2)
        up_to = f"a {growth.shape} of memory up to batch {fits}"
        reason += f"; {up_to} predicts it, {far} times further, and memory may bend on the way"
    return Largest(
        candidate, False, (*prediction.notes, Note("capacity.max_batch_verified", f"not verified: {reason}"))
    )


def _request(explorer: Explorer, prediction: Prediction, batch: int, limit: int, left: float) -> Request:
    session = explorer.step.session
    return Request(
        workload=prediction.packed,
        device=str(session.device),
        dtype=session.dtype,
        seed=0,
        batch=batch,
        small=explorer.working[0].batch,
        limit_bytes=limit,
        seconds=min(_STEP_LIMIT, left - _START_S),
    )


def _prediction_checked(
    explorer: Explorer, prediction: Prediction, limit: int, left: float, probe: Callable[[Request, float], Outcome]
) -> tuple[str, int]:
    """Run a smaller batch in a fresh process: how its peak compares, and the candidate, less where it took more.

    No text where no time is left.
    """
    batch, growth = _affordable(explorer, prediction, left), explorer.memory_growth()
    if batch is None or growth is None:
        return "", prediction.candidate
    outcome = probe(_request(explorer, prediction, batch, limit, left), left)
    if outcome.status != "ok" or outcome.peak_bytes is None:
        said = f"; batch {batch}, to check the prediction, did not run in a fresh process ({outcome.reason})"
        if outcome.status != "oom":
            return said, prediction.candidate
        half = int(math.sqrt(prediction.fits * batch))  # on a logarithmic scale, as it lies anywhere between
        return f"{said}: halfway to it, {half}, is given in place of {prediction.candidate}", half
    off = outcome.peak_bytes / growth.peak(batch) - 1
    said = f"; batch {batch} ran in a fresh process with {outcome.peak_bytes / 2**30:.3g} GiB, "
    said += f"{off:+.1%} against the prediction"
    if off <= _OFF:
        return said, prediction.candidate
    candidate = min(prediction.candidate, max(batch, _bent_by(explorer, batch, outcome.peak_bytes, limit)))
    return f"{said}: with it {candidate} is predicted in place of {prediction.candidate}", candidate


def _bent(explorer: Explorer, limit: int) -> int:
    """The largest batch within the limit by whatever curvature the peaks have, where a line has failed."""
    ran = [(look.batch, look.memory_bytes) for look in explorer.working if look.memory_bytes is not None]
    return fit_memory(*zip(*ran, strict=True), bends=True).largest(limit * _MARGIN)


def _bent_by(explorer: Explorer, batch: int, peak: int, limit: int) -> int:
    """The largest batch within so many bytes, where one far out took more than those before it foretold.

    By a quadratic through all of it, and as memory grew from the largest that ran before, at least in proportion: the
    smaller of both.
    """
    ran = [(look.batch, look.memory_bytes) for look in explorer.working if look.memory_bytes is not None]
    last, bytes_ = ran[-1]
    power = max(1.0, math.log(peak / max(bytes_, 1)) / math.log(batch / last))
    found = batch * (limit * _MARGIN / peak) ** (1 / power)
    growth = fit_memory(*zip(*ran, (batch, peak), strict=True))
    return int(min(found, growth.largest(limit * _MARGIN)) if growth.square is not None else found)


def _extend(explorer: Explorer, deadline: float) -> None:
    """Go on doubling until peak memory clearly grows, for a quarter of the time at most."""
    end = explorer.clock.now() + (deadline - explorer.clock.now()) / 4
    n = explorer.working[-1].batch
    while explorer.memory_growth() is None:
        n *= 2
        if explorer.clock.now() + 8 * explorer.predicted_s(n) > end or explorer.look(n).status != "ok":
            return


def _null(reason: str, *notes: Note) -> Largest:
    return Largest(None, None, (*notes, Note("capacity.max_batch", reason)))
