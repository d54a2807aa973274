"""Which form trains some trials: both give each trial the model, the batches and the update it would have alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from pybatch.base.errors import WorkloadError
from pybatch.device.memory import available_bytes, release
from pybatch.device.precision import full_fp32
from pybatch.training.annealed import Annealed, Averaged
from pybatch.training.loop import Loop
from pybatch.training.replicas import Losses, Replicas
from pybatch.training.schedules import AVERAGE, CONSTANT
from pybatch.training.stack import ROUNDING, Stack, alone, same
from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import is_out_of_memory

Gradients = list[torch.Tensor | None]
_Made = TypeVar("_Made")
Forms = tuple[bool | None, bool | None]  # of a stack: whether to fold images, and to evaluate all replicas at once

MEMORY = 2**30  # bytes of parameters, gradients and optimizer states trained at a time, on a CPU
GPU_SHARE = 0.25  # of a GPU's free memory for them; what a step keeps for its backward pass grows with the batch
AGREE = 1e-3  # relative: losses of stacked and separate replicas after two steps; fp32 rounding is 1e-6, a fault is 0.1
NUDGES = 2  # trainings begun one rounding away, by which it is measured how far rounding grows at a high rate
GROWN = 10.0  # times what those differ by: more is no rounding
COARSE = 0.3  # of the norm: first gradients in bf16, whose rounding comes to a tenth, or with TensorFloat-32
INTERVAL = 8  # steps between two evaluations in the middle of a trial
SAMPLE = 4  # replicas by which the loop is timed

# By what trials are alike in: the forms of a stack, or that a loop is faster.
_chosen: dict[tuple[object, ...], tuple[Forms | None, None]] = {}


class StackTooLargeError(MemoryError):
    """Memory ran out for these trials together: take fewer at a time."""


def choose(
    workload: Workload, trials: Sequence[Trial], device: torch.device, how: Literal["stacked", "loop"] | None = None
) -> tuple[Replicas, str | None]:
    """The faster form for these trials, ready at step 0, and why they are not stacked where they can't be.

    It is measured once for trials alike but for rates and seeds, and of about as many; a stack that agreed with the
    loop there is taken to agree at other rates.

    Args:
        workload, trials, device: what is trained, and where.
        how: "stacked" or "loop" to have one of them without measuring.

    Raises:
        StackTooLargeError: memory ran out for all of them together.
    """
    schedule = trials[0].schedule
    if schedule != CONSTANT:
        return (Averaged if schedule == AVERAGE else Annealed)(workload, trials, device), None
    if how == "loop" or len(trials) == 1 or any(map(alone, trials)):
        return Loop(workload, trials, device), None
    if how == "stacked":
        return Stack(workload, trials, device), None
    first = trials[0]
    settings = replace(first.scaled, group={**first.scaled.group, "lr": 0.0}, warmup_from=0.0)
    kind = (first.workload, first.batch, first.optimizer, first.dtype, repr(settings))
    alike = (*kind, str(device), len(trials).bit_length())
    forms, reason = _chosen.get(alike) or _compared(workload, trials, device)
    if reason is None:  # else other rates may agree
        _chosen[alike] = forms, None
    if forms is None:
        return Loop(workload, trials, device), reason
    chosen = _within_memory(lambda: Stack(workload, trials, device))
    chosen.folded, chosen.together = forms  # those that were found to agree
    return chosen, None


def _compared(workload: Workload, trials: Sequence[Trial], device: torch.device) -> tuple[Forms | None, str | None]:
    """The forms of a stack that agrees with separate replicas and is faster; else None and, if it does not, why."""
    few = trials[:: max(1, len(trials) // SAMPLE)][:SAMPLE]
    places = [trials.index(trial) for trial in few]
    loop, own, separate = _timed(Loop(workload, few, device), range(len(few)))
    try:
        timed = _within_memory(lambda: _timed_stack(workload, trials, device, places))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, WorkloadError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, f"not stacked: a stack of its replicas fails ({line})"
    (stacked, theirs, together), forms = timed
    exact = trials[0].dtype == "fp32" and device.type == "cpu"
    if exact:  # else two steps of Adam may go anywhere
        pairs = [[(there[i], here[j]) for j, i in enumerate(places)] for here, there in zip(loop, stacked, strict=True)]
        if (off := _off(workload, few, device, pairs)) is not None:
            return None, f"not stacked: losses of stacked and separate replicas differ ({off[0]:.6g}, {off[1]:.6g})"
    if not same(theirs, own, ROUNDING if exact else COARSE) or not (exact or _same_in_fp32(workload, few, device)):
        return None, "not stacked: gradients of stacked and separate replicas differ"
    return (forms if together <= separate * len(trials) / len(few) else None), None


def _within_memory(make: Callable[[], _Made]) -> _Made:
    """What is made of a stack; StackTooLargeError where memory runs out."""
    try:
        return make()
    except (RuntimeError, MemoryError, WorkloadError) as error:
        if not is_out_of_memory(error):
            raise
    raise StackTooLargeError("memory ran out for these trials together")  # no trace holds what the stack held


def memory_for(device: torch.device) -> int:
    """Bytes of parameters, gradients and optimizer states that are trained on a device at a time."""
    if device.type != "cuda":
        return MEMORY
    release(device)  # what torch's allocator keeps counts as taken
    return int(GPU_SHARE * available_bytes(device))


def chunks(trials: Sequence[Trial], parameter_bytes: int, memory: int) -> list[list[Trial]]:
    """Trials in groups whose parameters, gradients and states (at most two more copies) fit so many bytes of memory.

    Middle rates come first. A good rate found early shortens the trials of the groups after it.
    """
    rates = sorted({trial.lr for trial in trials})
    centre = len(rates) // 2
    ordered = sorted(trials, key=lambda t: (abs(rates.index(t.lr) - centre), t.lr, t.seed))
    size = max(1, memory // max(1, 4 * parameter_bytes))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _timed_stack(
    workload: Workload, trials: Sequence[Trial], device: torch.device, index: Sequence[int]
) -> tuple[tuple[Losses, Gradients, float], Forms]:
    """As `_timed`, of a stack, and what it chose."""
    made = Stack(workload, trials, device)
    return _timed(made, index), (made.folded, made.together)


def _timed(replicas: Replicas, index: Sequence[int]) -> tuple[Losses, Gradients, float]:
    """Losses after two steps, gradients of the first, for these replicas, seconds of INTERVAL steps and an evaluation.

    A fault too small to show in losses so early shows in gradients, which are taken at the same parameters.
    """
    replicas.advance(1)
    gradients = replicas.gradients(index)
    replicas.advance(1)
    losses = replicas.evaluate()  # the first one also prepares
    step, device = math.inf, replicas.device
    for _ in range(2):
        begin = time.perf_counter()
        replicas.advance(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        step = min(step, time.perf_counter() - begin)
    begin = time.perf_counter()
    replicas.evaluate()  # waits for the device
    return losses, gradients, INTERVAL * step + time.perf_counter() - begin


def _same_in_fp32(workload: Workload, trials: Sequence[Trial], device: torch.device) -> bool:
    """Whether the gradients of a first step are the same in fp32, where rounding hides no fault."""
    found = []
    with full_fp32():
        for kind in (Stack, Loop):
            made = kind(workload, [replace(trial, dtype="fp32") for trial in trials], device)
            made.advance(1)
            found.append(made.gradients(range(len(trials))))
    return same(found[0], found[1], ROUNDING)


def _off(
    workload: Workload, trials: Sequence[Trial], device: torch.device, pairs: Sequence[Sequence[tuple[float, float]]]
) -> tuple[float, float] | None:
    """Losses (stacked, separate) that differ by more than rounding, of [splits][trials]; None where none do.

    At a high rate two steps may grow a rounding a thousandfold, in either form: it is seen by how far the loop comes
    from itself, begun one rounding away. A fault shows at the other rates, of which one must agree.
    """
    apart = [[not _agree(*pair) for pair in own] for own in pairs]
    if not any(map(any, apart)):
        return None
    if not any(not any(column) for column in zip(*apart, strict=True)):
        return next(pair for own in pairs for pair in own if not _agree(*pair))
    grown = [[0.0] * len(trials) for _ in pairs]
    for seed in range(NUDGES):
        nudged = Loop(workload, trials, device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in (p for session in nudged.sessions for p in session.parameters):
                signs = torch.randint(2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + torch.finfo(p.dtype).eps * signs.to(p))
        nudged.advance(2)
        for split, (own, losses) in enumerate(zip(pairs, nudged.evaluate(), strict=True)):
            grown[split] = [max(g, abs(x - b)) for g, x, (_, b) in zip(grown[split], losses, own, strict=True)]
    return next(
        (
            (a, b)
            for own, far in zip(pairs, grown, strict=True)
            for (a, b), by in zip(own, far, strict=True)
            if not _agree(a, b) and not abs(a - b) <= GROWN * by
        ),
        None,
    )


def _agree(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= AGREE * max(abs(a), abs(b), 1e-3)
