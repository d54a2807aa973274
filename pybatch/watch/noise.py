"""The noise scale of a training that is watched, by the best source that its loop, model and optimizer offer.

DDP or FSDP2 where there are several processes; micro-batches where a step has several; else exact per-example
gradients; else Adam's moments; else the halves of a batch. All but the first and Adam's are of every so many steps, as
seldom as their cost asks for.
What fails ends the source, never the training.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pybatch.base.errors import PybatchError, UsageError
from pybatch.fits.noise import MIN_BLOCKS
from pybatch.noise.attachment import attach
from pybatch.noise.handle import Collector, Examples, Handle
from pybatch.noise.sources.adam_moments import MomentsNoise
from pybatch.noise.sources.examples import EVERY, ExampleNoise
from pybatch.noise.sources.fused import OptimizerNoise
from pybatch.noise.sources.micro_batches import MicroBatchNoise
from pybatch.optim import FusedOptimizer
from pybatch.records import NoiseScale
from pybatch.watch.batching import Batching
from pybatch.watch.halves import HalvesNoise

_SINGLES = 3  # steps of one backward pass each, after which a loop of micro-batches is taken for an ordinary one
_TRIED = 8  # watched steps, after which the cost of one is known; the first compiles and loads
_SWIFT = 0.25  # quantile of times that is compared: a slow spell that falls on watched steps is not their cost
_LATEST = 64  # other steps that they are compared with
_SHORT = 0.020  # s; of shorter steps hooks are felt anyway
_COST = 0.008  # share of a training's time that its noise may take: hooks and records take as much again
_ALIKE = 0.01  # share by which what a script counts may differ from the examples seen
_FIRST = 3  # steps from one to the next whose micro-batches are measured at first: one in between is untouched
_PAIRS = 2 * MIN_BLOCKS  # of a training whose length is known, at least, whatever that costs
_OFTEN = 1.2  # times more seldom, from which on the source is made anew
_KNOWN = ("unresolved", "lower_bound", "resolved")
_WITHIN = ("per-example", "adam-moments", "halves")  # sources of one backward pass a step
_Spaced = ExampleNoise | MicroBatchNoise | HalvesNoise  # those that are of every so many steps
_REPEATED = (
    "a step makes several backward passes of one forward pass (retain_graph=True), of which each gives a part of its "
    "gradient: Adam's moments alone see the whole"
)
_AHEAD = (
    "torch.autograd.grad() goes through a forward pass before its backward pass does (for a penalty on gradients, "
    "say), and per-example gradients and halves of a batch take the first for the step's"
)
REMEDY = "Give the training two or more backward passes a step (gradient accumulation), or train with Adam or AdamW"


class NoiseWatch:
    """Reads the noise of one training; `noise` is what there is, or None for `reasons`.

    Args:
        model, optimizer: what is trained.
        passes: backward passes of a step.
        scaler: the GradScaler in use.
        compiled: whether some of the model is, which per-example gradients can't look into.
        steps: that the training will make, where that is known: a short one is measured oftener.
    """

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        passes: int,
        scaler: Any,
        compiled: bool,
        steps: int | None = None,
    ) -> None:
        self._model, self._optimizer, self._passes = model, optimizer, passes
        self._scaler, self._compiled = scaler, compiled
        self._handle: Handle | None = None
        self._ended: list[Handle] = []  # a source that ended early, with what it had measured
        self._offers: list[str] = []
        self._common: dict[str, Any] = {}
        self._batching: Batching | None = None
        self._steps = steps
        self._every = self._spaced(EVERY if passes < 2 else _FIRST)
        self._before: float | None = None  # the end of the step before
        self._tried = False  # whether a step was watched: the first one takes longest
        self._watched: list[float] = []  # seconds of a watched step and the one after it, and of the others
        self._others: deque[float] = deque(maxlen=_LATEST)
        self._last: float | None = None  # of a watched step, until the one after it is over
        self._seen = 0  # examples of steps whose noise the optimizer measures itself,
        self._counted = 0.0  # and what the script has told it of them
        self.watched = False  # whether the step under way is one whose examples' gradients are taken
        self._repeated = self._ahead = False
        self.begun = False
        self.reasons: list[str] = []

    def begin(self, batching: Batching | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Attach, within the forward pass of these arguments."""
        self.begun = True
        if self._model is None or batching is None:
            self.reasons.append("the model's forward() gets no tensor to count examples in")
            return
        examples: Examples = None if batching.first == 0 else batching.size
        self._common, self._batching = {"examples": examples}, batching
        self._offers = ["own"]
        if self._passes < 2:
            self._offers += _WITHIN
        self._next()
        if isinstance(self._handle, Collector):
            self._handle.begin(module, args, kwargs)

    def stepping(self, examples: int = 0) -> bool:
        """The optimizer's step begins: whether the passes before it took longer for the sake of the noise scale.

        Args:
            examples: of these passes.
        """
        if isinstance(self._handle, OptimizerNoise) and isinstance(self._optimizer, FusedOptimizer):
            self._seen += examples
            self._counted += self._optimizer._sums.examples
        handle = self._handle
        self.watched = isinstance(handle, _Spaced) and handle.watching
        return self.watched and self._every > 1

    def repeated(self, parts: int, ahead: bool) -> None:
        """Several backward passes went through one forward pass.

        Args:
            parts: of them, that gave a part of the step's gradient.
            ahead: whether one that gave none came first.
        """
        self._repeated |= parts > 1
        self._ahead |= ahead

    def stepped(self) -> None:
        """A step is over: turn to another source where this one gives nothing."""
        if self._repeated and isinstance(self._handle, _Spaced):
            self._offers = ["adam-moments"]
            self._ended = []  # what was measured is of parts of gradients
            self._leave(_REPEATED)
        elif self._ahead and isinstance(self._handle, ExampleNoise | HalvesNoise):
            self._offers = ["adam-moments"]
            self._ended = [one for one in self._ended if not isinstance(one, ExampleNoise | HalvesNoise)]
            self._leave(_AHEAD)
        handle = self._handle
        if handle is None:
            return
        error = getattr(handle, "broken", None) or getattr(handle, "refused", None)
        if error is not None and isinstance(handle, Collector) and handle.noise.status == "resolved":
            self._offers = []  # what was measured until then stands
            self._ended.append(handle)
            self._leave(f"{error}")
        elif error is not None:
            self._leave(str(error))
        elif isinstance(handle, MicroBatchNoise) and handle.singles >= _SINGLES and not handle.pairs:
            self._offers = list(_WITHIN)
            self._leave("")
        elif isinstance(handle, _Spaced):
            self._weigh(handle)

    def detach(self) -> None:
        """Take its hooks off; what was measured stays readable."""
        if self._handle is not None:
            self._handle.detach()

    def read(self) -> NoiseScale | None:
        """The noise scale of the newest stretch, with the run as its trajectory; waits for the device."""
        handles = [*self._ended, *([self._handle] if self._handle is not None else [])]
        best: NoiseScale | None = None
        for handle in handles:
            try:
                found = self._in_examples(handle.noise) if isinstance(handle, OptimizerNoise) else handle.noise
            except PybatchError as error:
                self.reasons.append(str(error).removesuffix("."))
                continue
            if best is None or _KNOWN.index(found.status) >= _KNOWN.index(best.status):
                best = found
        return best

    def _in_examples(self, noise: NoiseScale) -> NoiseScale:
        """An optimizer's own noise scale is in what the script gave `accumulate(n)`, which may be tokens."""
        per_example = self._counted / self._seen if self._seen and self._counted else 1.0
        if abs(per_example - 1.0) < _ALIKE:
            return noise
        return replace(noise, unit="counts").in_examples(per_example)

    def _leave(self, reason: str) -> None:
        if self._handle is not None:
            self._handle.detach()
        if reason:
            self.reasons.append(reason.removesuffix("."))
        self._handle = None
        self._next()

    def _next(self) -> None:
        while self._offers and self._handle is None:
            offer = self._offers.pop(0)
            try:
                self._handle = self._make(offer)
            except (PybatchError, RuntimeError) as error:  # the latter where a model takes no hooks, as of torch.jit
                self.reasons.append(str(error).removesuffix("."))

    def _make(self, offer: str) -> Handle | None:
        model, optimizer = self._model, self._optimizer
        assert model is not None  # for the type checker; `begin` has looked
        if offer == "own":
            return self._own(model)
        if offer == "per-example":
            if self._compiled:
                raise UsageError("per-example norms: the model is compiled, and its operations can't be seen")
            kind = guarded(ExampleNoise, ("_enter", "_leave", "_take_pass", "_close", "_drop"))
            every = self._spaced(max(EVERY, self._every))
            own: dict[str, Any] = {"scaler": self._scaler, "yielding": True, "every": every}
            return kind(model, optimizer, **self._common, **own)
        if offer == "micro-batches":
            return self._micro_batches(model)
        if offer == "halves":
            return self._halves(model)
        return guarded(MomentsNoise, ("_began", "_stepped"))(model, optimizer, **self._common)

    def _own(self, model: nn.Module) -> Handle | None:
        """Of several processes, or of several passes a step."""
        if any(hasattr(p, "_handle") and hasattr(p, "_params") for p in model.parameters()):
            raise UsageError(f"{type(model).__name__} is of FSDP1, whose gradients are not seen. Use fully_shard")
        optimizer = self._optimizer
        if isinstance(optimizer, FusedOptimizer) and optimizer.accumulates and self._passes > 1:
            if optimizer.measures:
                return OptimizerNoise(optimizer)  # exact, in the pass that adds the gradients up
            raise UsageError(
                f"{type(optimizer).__name__}.accumulate() takes the gradients away before they can be looked at; made "
                "with noise=True it measures them itself"
            )
        handle = attach(model, optimizer, None, **self._common, scaler=self._scaler) if _shared(model) else None
        if isinstance(handle, Collector):
            handle.look_away()
        if handle is not None or self._passes < 2:
            return handle
        return self._micro_batches(model)

    def _micro_batches(self, model: nn.Module) -> Handle:
        kind = guarded(MicroBatchNoise, ("_recover", "close", "_drop", "_hold", "_end", "_begin", "_take_back"))
        return kind(model, self._optimizer, **self._common, scaler=self._scaler, every=self._every)

    def _halves(self, model: nn.Module) -> Handle:
        assert self._batching is not None  # `begin` has looked
        if self._compiled:
            raise UsageError("halves of a batch: the model is compiled, and its backward pass can't be run twice")
        kind = guarded(HalvesNoise, ("_leave", "arrived", "_compare", "_step"))
        parting = next((one.parting for one in self._ended if isinstance(one, HalvesNoise)), None)
        every = self._spaced(max(EVERY, self._every))
        return kind(model, self._optimizer, self._batching, scaler=self._scaler, every=every, parting=parting)

    def _spaced(self, every: int) -> int:
        """Steps from one that is measured to the next: no more than leave a short training its interval."""
        return every if self._steps is None else max(1, min(every, self._steps // _PAIRS))

    def _weigh(self, handle: _Spaced) -> None:
        """Watch more seldom where a watched step takes much longer than others."""
        now, before = time.perf_counter(), self._before
        self._before = now
        if before is not None and self._tried:
            self._take(now - before)
        self._tried |= self.watched
        if len(self._watched) < _TRIED or not self._others:
            return
        plain = _swift(self._others)
        # Two steps with two steps: a sum scatters relatively less, so that its quantile is not twice that of one.
        pairs = [a + b for a, b in itertools.pairwise(self._others)]
        extra = _swift(self._watched) - (_swift(pairs) if pairs else 2 * plain)
        self._watched = []
        every = self._spaced(math.ceil(extra / (_COST * plain)) if plain > _SHORT else EVERY)
        if every > _OFTEN * self._every:
            self._every = every
            handle.detach()
            self._handle = None
            try:
                made = self._make(handle.source)
            except (PybatchError, RuntimeError) as error:  # the script has put a hook on since, say
                self._ended.append(handle)
                self.reasons.append(str(error).removesuffix("."))
                return
            assert isinstance(made, Collector)
            made.take_over(handle)
            self._handle = made

    def _take(self, seconds: float) -> None:
        """A step's time: the one after a watched step pays for it too, as memory that was held is asked for anew."""
        if self.watched:
            if self._last is not None:  # every step is watched
                self._watched.append(2 * self._last)
            self._last = seconds
            return
        if self._last is not None:
            self._watched.append(self._last + seconds)
            self._last = None
            if self._every > 2:
                return
        self._others.append(seconds)


def _swift(seconds: Iterable[float]) -> float:
    """The quantile of times that is compared."""
    ordered = sorted(seconds)
    return ordered[int(_SWIFT * len(ordered))]


def _shared(model: nn.Module) -> bool:
    """Whether its gradients are averaged over processes within the backward pass."""
    if isinstance(model, FSDPModule):
        return True
    return isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1


_Kind = TypeVar("_Kind", bound=Collector)


def guarded(kind: type[_Kind], names: Iterable[str]) -> Callable[..., Collector]:
    """The source, but what it raises in these hooks of its own ends it, and is kept in `broken`."""

    def safe(name: str) -> Any:
        plain = getattr(kind, name)

        @functools.wraps(plain)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.broken is not None:
                return None  # of a hook: go on as you were
            try:
                return plain(self, *args, **kwargs)
            except Exception as error:
                self.broken = error
                return None

        return call

    return type(
        f"Guarded{kind.__name__}", (kind,), {"broken": None, "looks": False} | {name: safe(name) for name in names}
    )
