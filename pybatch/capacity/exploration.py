"""A first, quick look at each batch size, in ascending order: does it run, its time, its memory, its FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pybatch.base.errors import WorkloadError
from pybatch.capacity.flops import count_flops
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.traffic import Traffic, update_bytes
from pybatch.device.clock import Clock
from pybatch.device.memory import PeakMemory
from pybatch.fits.memory import MemoryGrowth, fit_memory
from pybatch.records import BatchStatus
from pybatch.workloads.running.session import is_out_of_memory

OUT_OF_TIME = "the time budget ended before it was timed"
_STRIDE = 8  # largest ratio of successive batches, so that memory is known before it can run out
_GAIN = 0.02  # a doubling that gains less throughput is not worth going on for
_SCARCE = 5  # times the longest step allowed, while too few batch sizes for a fit have run
_PATIENCE = 2  # such doublings in a row
_LEAST = 6  # doublings at least, so that a floor can be told from a line
FITTABLE = 3  # batch sizes, the fewest a fit can be made of
_LOOK_STEPS = 5  # that a look takes, at most, where steps are long
_LOOK_S = 0.05  # of timed steps at a batch size, where they are short
_TIMED_STEPS = 50  # of each batch size are needed for times that say something
_LARGEST = 4  # batches tell how memory grows: small ones reuse what the allocator kept
_SIGNAL = 1 << 20  # bytes; a peak that grows by less is noise of the allocator


@dataclass(frozen=True)
class Look:
    """What a first look at one batch size found."""

    batch: int
    status: BatchStatus
    reason: str | None = None
    step_s: float | None = None  # best of a few steps
    memory_bytes: int | None = None
    flops: int | None = None
    moved_bytes: int | None = None  # read and written by its operators
    late: bool = False  # skipped for want of time, not for what the batch is


class Explorer:
    """Looks at batch sizes one by one and keeps what it found, in `looks`.

    Args:
        step: the training step.
        clock: times it.
        memory: reads its peak memory.
        memory_limit: bytes above which a batch is not run but predicted not to fit; None: no prediction.
    """

    def __init__(self, step: TrainingStep, clock: Clock, memory: PeakMemory, memory_limit: int | None) -> None:
        self.step, self.clock, self.memory, self.memory_limit = step, clock, memory, memory_limit
        self.looks: dict[int, Look] = {}
        self.flops_reason: str | None = None
        self._counts: dict[int, tuple[int, int]] = {}  # FLOPs and bytes counted, by batch size

    @property
    def working(self) -> list[Look]:
        """The looks that found the batch to run, ascending."""
        return sorted((look for look in self.looks.values() if look.status == "ok"), key=lambda look: look.batch)

    def sanity(self, reference: int) -> int:
        """Run one step of some small batch, and return which; raises the workload's error where none of them works.

        Some models refuse one example (batch normalization), so that a failure there is not yet the workload's.
        """
        first: WorkloadError | None = None
        rows: set[int | None] = set()  # that came where others were asked for
        for n in dict.fromkeys((1, 2, reference)):
            if first is not None and rows == {n} == {self._rows(2 * n)}:
                raise first  # it returns so many whatever it is asked for, and would seem to work at this size alone
            try:
                self._run(n)
            except WorkloadError as error:
                first = first or error
                rows.add(error.rows)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                name = self.step.session.workload.name
                text = f"a step of workload {name!r} at batch {n} does not fit in memory ({first_line(error)})"
                first = first or WorkloadError(f"{text}. Take a smaller model, or a device with more.")
                continue
            finally:
                self.step.clear()
            self.memory.rebase(self.step.held_bytes)
            return n
        assert first is not None
        raise first

    def _rows(self, n: int) -> int | None:
        """Examples that come where so many are asked for; None where that fails in another way."""
        try:
            self.step.session.batch(n)
        except WorkloadError as error:
            return error.rows
        except (RuntimeError, MemoryError):
            return None
        return n

    def look(self, n: int) -> Look:
        """Look at one batch size, unless that was done; never raises for what the batch size itself causes."""
        if n not in self.looks:
            excess = self.excess(n)
            self.looks[n] = (
                self._guarded(n, lambda: self._run(n)) if excess is None else Look(n, "predicted_oom", excess)
            )
        return self.looks[n]

    def excess(self, n: int) -> str | None:
        """How a step of n examples is predicted to exceed the memory limit, or None."""
        growth = self.memory_growth()
        if growth is None or self.memory_limit is None or growth.peak(n) <= self.memory_limit:
            return None
        return f"predicted {growth.peak(n) / 2**30:.3g} GiB, limit {self.memory_limit / 2**30:.3g} GiB"

    def look_again(self, n: int) -> Look:
        """Time a batch size once more, keeping the better time: for a step that a disturbance may have hit."""
        before = self.looks[n]

        def run() -> Look:
            self.step.load(n)
            self.clock.time(self.step, 1)
            seconds = self._best(3)
            return replace(before, step_s=min(seconds, before.step_s or seconds))

        self.looks[n] = self._guarded(n, run)
        return self.looks[n]

    def timed(self, n: int, step_s: float) -> None:
        """Replace a look's rough step time by a measured one."""
        self.looks[n] = replace(self.looks[n], step_s=step_s)

    def skip(self, n: int, reason: str) -> None:
        """Note that a batch size is not run for want of time."""
        self.looks[n] = Look(n, "skipped", reason, late=True)

    def memory_growth(self) -> MemoryGrowth | None:
        """Peak memory against batch size, of the largest that ran; None where memory does not clearly grow."""
        points = [(look.batch, look.memory_bytes) for look in self.working if look.memory_bytes is not None]
        if len(points) < 3:
            return None
        batches, peaks = zip(*points[-_LARGEST:], strict=True)
        growth = fit_memory(batches, peaks)
        grown = growth.line[1] * (max(batches) - min(batches))
        return growth if grown > max(_SIGNAL, 4 * growth.residual) else None

    def predicted_s(self, n: int) -> float:
        """Seconds of a step of n examples; 0 before any was seen.

        Near the largest batch seen, on the line through the last two; far beyond it in proportion, an upper estimate.
        """
        seen = [(look.batch, look.step_s) for look in self.working if look.batch <= n and look.step_s is not None]
        if not seen:
            return 0.0
        last, seconds = seen[-1]
        if n > _STRIDE * last:
            return seconds * n / last
        before, less = seen[-2] if len(seen) > 1 else (0, seconds)
        return seconds + max(0.0, seconds - less) / (last - before) * (n - last)

    def look_s(self, n: int) -> float:
        """Seconds that a look at n examples takes at most, before any of it was done."""
        return _LOOK_STEPS * self.predicted_s(n) + self.step.setup_s

    def timing_s(self, n: int) -> float:
        """Seconds in which n examples and all that ran can be timed, if only just."""
        ran = sum(look.step_s for look in self.working if look.step_s is not None)
        return _TIMED_STEPS * (ran + self.predicted_s(n))

    def _guarded(self, n: int, run: Callable[[], Look]) -> Look:
        try:
            return run()
        except Exception as error:
            failure = failed(error)
        finally:
            self.step.clear()
        self.memory.start()  # out of `except`, where the traceback no longer holds the step's tensors
        return Look(n, *failure)

    def _run(self, n: int) -> Look:
        self.step.load(n)
        flops, moved = self._count(n)
        self.memory.start()  # the FLOP counter's own step holds more memory than a plain one
        first = self.clock.undisturbed(self.step, 1)[0]
        self.step.check()
        seconds = self._best(3) if first < 2 * _LOOK_S else min(first, *self.clock.undisturbed(self.step, 1))
        return Look(n, "ok", None, seconds, self.memory.peak(), flops, moved_bytes=moved)

    def _count(self, n: int) -> tuple[int | None, int | None]:
        """FLOPs and bytes of the loaded step: counted, or on the lines of the batches counted, where they lie on lines.

        A compiled step's bytes are unknown: the compiler fuses operators.
        """
        seen = sorted(self._counts)
        if len(seen) >= 3 and self.flops_reason is None:
            lines = [_on_line([(m, self._counts[m][i]) for m in seen], n) for i in range(2)]
            if None not in lines:
                return lines[0], None if self.step.compiled else lines[1]
        with self.step.session.as_written(), Traffic() as traffic:
            flops, self.flops_reason = count_flops(self.step)
        self.step.check()
        moved = traffic.bytes + update_bytes(self.step.session.parameters, self.step.optimizer.state)
        if flops is not None:
            self._counts[n] = flops, moved
        return flops, None if self.step.compiled else moved

    def _best(self, least: int) -> float:
        """Best of a few steps, of more where they are short."""
        best = min(self.clock.undisturbed(self.step, least))
        return min(best, *self.clock.undisturbed(self.step, min(50, max(1, int(_LOOK_S / max(best, 1e-6))))))


def _on_line(points: Sequence[tuple[int, int]], n: int) -> int | None:
    """The value at n of the line that all points lie on exactly; None where they do not."""
    (n1, v1), (n2, v2), *rest = points
    if any((v - v1) * (n2 - n1) != (v2 - v1) * (m - n1) for m, v in rest):
        return None
    return v1 + (v2 - v1) * (n - n1) // (n2 - n1)


def ladder(batches: Sequence[int]) -> Iterator[int]:
    """The batch sizes in ascending order, with steps between so that none is more than 8 times the one before."""
    last = 1
    for n in sorted(set(batches)):
        while last * _STRIDE < n:
            last *= _STRIDE
            yield last
        last = n
        yield n


def explore_given(
    explorer: Explorer, batches: Sequence[int], deadline: float, step_limit: float, end: float = 0.0
) -> None:
    """Look at the batch sizes a user gave. A batch whose steps take too long for the budget is skipped.

    The deadline is for long steps, `end` for all: where setting up has taken the time, short ones still have enough.
    Batch sizes between them, which are only looked at to learn about memory, are not worth compiling.
    """
    for n in ladder(batches):
        seconds = explorer.predicted_s(n)
        done = explorer.clock.now() + explorer.look_s(n)
        if explorer.excess(n) is None and seconds > step_limit:
            explorer.skip(n, f"a step would take about {seconds:.2g} s, too long for the time budget")
        elif explorer.excess(n) is None and done > deadline and done + explorer.timing_s(n) > end:
            explorer.skip(n, OUT_OF_TIME)
        elif n in batches:
            explorer.look(n)
        else:
            with explorer.step.session.as_written():
                explorer.look(n)


def explore_doubling(
    explorer: Explorer,
    deadline: float,
    step_limit: float,
    last_deadline: float | None = None,
    doublings: int = 1,
    runs: int = 1,
) -> str:
    """Double the batch from 1 on, so many times at a go; returns why it ended.

    It ends when two doublings in a row gain less than 2 % throughput, when steps get too long for the budget, or when
    memory ends. A batch size that the workload refuses is passed over; where all below `runs` (which runs) are
    refused, doubling goes on from there: until some batch has run, nothing bounds the memory of the next. Until enough
    batch sizes for a fit have run, longer steps are allowed, `last_deadline` counts, and at last those are looked at
    that several doublings at a go have passed over.
    """
    n, best, flat, gain = 1, 0.0, 0, (1 + _GAIN) ** doublings

    def late(n: int) -> str | None:
        """Why there is no time for a look at this batch size."""
        seconds, scarce = explorer.predicted_s(n), len(explorer.working) < FITTABLE
        if seconds > step_limit * (_SCARCE if scarce else 1):
            return f"a step of batch {n} would take too long for the time budget ({seconds:.2g} s)"
        end = last_deadline if scarce and last_deadline is not None else deadline
        if explorer.clock.now() + explorer.look_s(n) > end:
            return f"the share of the time budget for finding the range ended before batch {n}"
        return None

    while True:
        if (ended := late(n)) is not None:
            return ended if doublings == 1 else ended + _between(explorer, n, late)
        look = explorer.look(n)
        if look.status in ("oom", "predicted_oom"):
            return f"batch {n} does not fit in memory{_between(explorer, n, late) if doublings > 1 else ''}"
        if look.step_s is not None:
            if n / look.step_s <= best * gain:
                look = explorer.look_again(n)
            throughput = n / (look.step_s or math.inf)
            flat = 0 if throughput > best * gain else flat + doublings
            best = max(best, throughput)
        if flat >= _PATIENCE and len(explorer.working) >= max(_LEAST // doublings, FITTABLE + 1):
            return f"throughput gained less than {_GAIN:.0%} over two doublings up to batch {n}"
        before, n = n, n * 2**doublings
        if not explorer.working and before < runs < n:
            n = runs


def _between(explorer: Explorer, n: int, late: Callable[[int], str | None]) -> str:
    """Look at doublings below n that were passed over, the largest first, until a fit can be made; says which."""
    passed = {n // 2, *(2 * look.batch for look in explorer.working)} - set(explorer.looks)
    found = []
    for m in sorted((m for m in passed if 1 <= m < n), reverse=True):
        if len(explorer.working) < FITTABLE and late(m) is None:
            explorer.look(m)
            found.append(m)
    return f", and batch {' and '.join(map(str, found))} between" if found else ""


def failed(error: Exception) -> tuple[BatchStatus, str]:
    """Status and reason of a batch size whose step raised; what is neither the workload's nor memory's is raised on."""
    if isinstance(error, WorkloadError):
        return "skipped", str(error)
    if is_out_of_memory(error):
        return "oom", first_line(error)
    raise error


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
