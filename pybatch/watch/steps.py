"""The steps of a training as they are made: their time, where it goes, their sizes. Knows nothing of hooks."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from pybatch.watch.marks import Marks

PARTS = ("waiting", "forward", "backward", "between", "update")
_WARM_UP = 3  # steps that are not counted: they load code, fill caches, compile
_KEPT = 4000  # step times kept; of longer runs the newest
_BEHIND = 64  # steps whose marks may wait for the device


@dataclass(frozen=True)
class Step:
    """One update of the parameters, in seconds."""

    seconds: float  # from the end of the one before
    parts: tuple[float, ...]  # PARTS
    loading: float  # of it inside a DataLoader
    sizes: tuple[int, ...]  # examples of its passes
    usual: bool  # no evaluation pass since the step before, and nothing that pybatch did in it


@dataclass
class _Open:
    """The step under way: marks, and what happened since the step before."""

    begun: Any  # the end of the step before
    last: Any  # what waiting is counted from: the end of the step before, or of its last backward pass
    spans: list[tuple[int, Any, Any]] = field(default_factory=list)  # part, first mark, last mark
    sizes: list[int] = field(default_factory=list)
    loading: float = 0.0
    usual: bool = True


class Steps:
    """Takes the moments of a training in their order, and makes steps of them."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._open: _Open | None = None
        self._waiting: deque[tuple[_Open, Any]] = deque()
        self._pass: Any = None  # begin of the forward pass under way
        self._backward: Any = None
        self._update: Any = None
        self.count = 0
        self.kept: deque[Step] = deque(maxlen=_KEPT)
        self.sizes: Counter[int] = Counter()  # passes by their examples
        self.passes: Counter[int] = Counter()  # steps by their passes

    def forward(self) -> None:
        """A forward pass with gradients begins."""
        self._pass = self._marks.mark()

    def backward(self, examples: int, cleared: bool = False) -> None:
        """The gradient has come to the output of the last forward pass.

        Args:
            examples: of that pass.
            cleared: the gradients of passes before it were cleared, so that they are no part of the update.
        """
        self._backward = now = self._marks.mark()
        step = self._open
        if step is not None and self._pass is not None:
            inside = self._update is not None
            step.spans += [(4 if inside else 0, step.last, self._pass), (1, self._pass, now)]
            if cleared:
                step.sizes.clear()
            step.sizes.append(examples)
        self._pass = None

    def passed(self) -> None:
        """The backward pass is over."""
        now = self._marks.mark()
        if self._open is not None and self._backward is not None:
            self._open.spans.append((2, self._backward, now))
            self._open.last = now
        self._backward = None

    def updating(self) -> None:
        """The optimizer's step begins, in which a closure may make passes."""
        self._update = now = self._marks.mark()
        if self._open is not None:
            self._open.spans.append((3 if self._open.sizes else 0, self._open.last, now))
            self._open.last = now

    def updated(self) -> None:
        """The optimizer's step is over."""
        now = self._marks.mark()
        step = self._open
        self.count += 1
        if step is not None and step.sizes and self._update is not None:
            step.spans.append((4, step.last, now))
            self._waiting.append((step, now))
        self._open, self._pass, self._backward, self._update = _Open(now, now), None, None, None
        while self._waiting and (len(self._waiting) > _BEHIND or self._marks.reached(self._waiting[0][1])):
            self._close(*self._waiting.popleft())

    def unusual(self) -> None:
        """Something else takes time in this step: an evaluation, or pybatch itself."""
        if self._open is not None:
            self._open.usual = False

    def loaded(self, seconds: float) -> None:
        """The script waited so long for a DataLoader."""
        if self._open is not None:
            self._open.loading += seconds

    def settle(self) -> None:
        """Take the steps whose marks were not reached yet; waits for the device."""
        while self._waiting:
            self._close(*self._waiting.popleft())

    @property
    def examples(self) -> int:
        """Of the passes of the step under way."""
        return sum(self._open.sizes) if self._open is not None else 0

    @property
    def micro_batch(self) -> int | None:
        """Examples of a pass: the most frequent number, as the last one of an epoch may have fewer."""
        return self.sizes.most_common(1)[0][0] if self.sizes else None

    @property
    def accumulation(self) -> int | None:
        """Passes of a step: the most frequent number."""
        return self.passes.most_common(1)[0][0] if self.passes else None

    @property
    def usual(self) -> list[Step]:
        """Steps of the usual sizes with nothing else in them."""
        size, passes = self.micro_batch, self.accumulation
        return [s for s in self.kept if s.usual and len(s.sizes) == passes and set(s.sizes) == {size}]

    def _close(self, step: _Open, end: Any) -> None:
        for examples in step.sizes:
            self.sizes[examples] += 1
        self.passes[len(step.sizes)] += 1
        if self.count <= _WARM_UP:
            return
        parts = [0.0] * len(PARTS)
        for part, first, last in step.spans:
            parts[part] += max(0.0, self._marks.seconds(first, last))
        whole = self._marks.seconds(step.begun, end)
        self.kept.append(Step(whole, tuple(parts), step.loading, tuple(step.sizes), step.usual))
