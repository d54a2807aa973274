"""What every source of norms shares: counting examples, rows kept on the device until read, and the record."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_leaves

from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.noise.closures import Evaluations
from pybatch.noise.confounds import confounds
from pybatch.noise.hooks import before_forward, transformed
from pybatch.noise.labels import ignored_in, ragged
from pybatch.noise.loss import Loss
from pybatch.noise.readback import Readback
from pybatch.records import NoiseScale, Note

Accumulation = Literal["mean", "sum", "weighted"]
Examples = int | Literal["count"] | None

COUNTING = "examples='count', accumulation='weighted' and handle.count(tokens) before each backward()"
ACCUMULATIONS = ("mean", "sum", "weighted")


class Count:
    """Examples of the micro-batches since the last `take`, seen at the model's forward pass or given by the user.

    Args:
        model: its forward passes in training mode and with gradients enabled each count as a micro-batch.
        examples: None: dimension 0 of the first tensor among the forward's arguments. A number: that many each time.
            "count": nothing is seen; the user calls `add` before each backward pass.
        started: called when such a forward pass begins.
    """

    def __init__(self, model: nn.Module, examples: Examples, started: Callable[[], object] | None = None) -> None:
        if not (examples in (None, "count") or (isinstance(examples, int) and examples > 0)):
            raise UsageError(f"examples {examples!r}: give the examples of a micro-batch, 'count', or None.")
        self._examples, self._started = examples, started
        self._sizes: list[float] = []
        self.forwards = 0  # passes with gradients since the last `take`, counted or not
        self.ignoring = False  # whether labels given to the first forward pass hold an ignore index
        self.modes: set[bool] = set()  # whether the model was in training mode in them
        self._hook = before_forward(model, self.see, with_kwargs=True)

    def add(self, n: float) -> None:
        """The next backward pass is over n examples (or tokens)."""
        if self._examples != "count":
            raise UsageError(f"count({n!r}): examples are counted already. Attach with examples='count' to give them.")
        if not (math.isfinite(n) and n > 0):
            raise UsageError(f"count({n!r}): n is the number of examples in the micro-batch, above 0. Pass len(x).")
        self._sizes.append(float(n))

    def take(self) -> list[float]:
        """The sizes since the last call, and forget them; empty where there was no forward pass either.

        Raises UsageError where there was one and it was not counted.
        """
        if self.forwards and not self._sizes:
            raise UsageError(
                "no examples were counted for this backward pass: handle.count(n) was not called before backward(), or "
                "the model is in evaluation mode. Attach with examples='count' and call it before each backward()."
            )
        sizes, self._sizes, self.forwards = self._sizes, [], 0
        return sizes

    @property
    def pending(self) -> int:
        """Micro-batches counted since the last `take`."""
        return len(self._sizes)

    @property
    def each(self) -> int | None:
        """Examples of every micro-batch, as the user gave them; None: they are looked for; 0: given one by one."""
        return 0 if self.given else self._examples  # type: ignore[return-value]

    @property
    def given(self) -> bool:
        """Whether it is the user who says how much a micro-batch counts."""
        return self._examples == "count"

    @property
    def sizes(self) -> list[float]:
        """Examples of the micro-batches since the last `take`."""
        return list(self._sizes)

    def forget(self) -> bool:
        """Leave out what was counted since the last `take`; returns whether there was anything."""
        some, self._sizes, self.forwards = bool(self._sizes), [], 0
        return some

    def remove(self) -> None:
        """Look no more."""
        self._hook.remove()

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pass begins."""
        if not torch.is_grad_enabled() or transformed():
            return
        self.forwards += 1
        if not self.modes:
            self.ignoring = ignored_in((args, kwargs))
        self.modes.add(module.training)
        if not module.training:
            return
        if self._started is not None:
            self._started()
        if isinstance(self._examples, int):
            self._sizes.append(float(self._examples))
        elif self._examples is None:
            if args and isinstance(args[0], torch.Tensor) and args[0].ndim and len(args[0]):
                self._sizes.append(float(len(args[0])))
                return
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
            if tensors and not len(tensors[0]):
                raise UsageError(
                    f"{type(module).__name__}.forward() got a batch without examples, of shape "
                    f"{tuple(tensors[0].shape)}. Leave it out: it has no gradient to measure."
                )
            if not tensors:
                raise UsageError(
                    f"{type(module).__name__}.forward() got no tensor to count examples in. "
                    "Attach with examples=N, or with examples='count' and call handle.count(n) before backward()."
                )
            self._sizes.append(float(len(tensors[0])))


def local_batch(sizes: list[float], accumulation: Accumulation) -> tuple[float, float]:
    """(examples, factor): a local gradient accumulated over these micro-batches, times factor, is a mean over so many.

    With equal weights the mean over micro-batches of n_i examples has the variance of one over k^2 / sum(1/n_i)
    independent examples; weighted by examples it is one over all of them.
    """
    k = len(sizes)
    if accumulation == "weighted":
        return sum(sizes), 1.0
    return k * k / sum(1.0 / n for n in sizes), 1.0 / k if accumulation == "sum" else 1.0


def combine(weighted: bool, members: Any, squares: Any, sizes: Any) -> tuple[Any, Any, Any]:
    """(sq_small, n_small, n_large) from sums over the members of a large batch whose gradient is their plain mean.

    Args:
        weighted: False: squares is sum |g_i|^2 and sizes is sum 1/n_i. True: each g_i carries the factor
            members n_i / n of an example-weighted mean; squares is sum |g_i|^2 / n_i and sizes is sum n_i.
        members, squares, sizes: numbers or tensors alike.

    Both expectations are exact for members of unequal size: E sq_small = |G|^2 + tr(Sigma) / n_small.
    """
    if weighted:
        return sizes * squares / (members * members), sizes / members, sizes
    return squares / members, members / sizes, members * members / sizes


class Handle(ABC):
    """A source of noise attached to a model; made by `pybatch.noise.attach`."""

    @property
    @abstractmethod
    def noise(self) -> NoiseScale:
        """The gradient noise scale of the newest stretch of steps that gives an interval, and the run as trajectory.

        Reading it waits for the device; nothing else does.
        """

    @abstractmethod
    def count(self, n: float) -> None:
        """Say, before backward(), how many examples (or tokens) the micro-batch holds; for examples="count".

        Raises:
            UsageError: `n` is not above 0, or the handle was attached with another `examples`.
        """

    @abstractmethod
    def detach(self) -> None:
        """Take the hooks off the model; what was measured stays readable."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The statistics, to be saved with the optimizer's state. A step under way is not in it."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; raises UsageError where it is another source's or another model's."""


class Collector(Handle):
    """A handle that makes rows of norms on the device and feeds them to the accumulator.

    Args:
        source: its name in the record.
        model: what is trained.
        device: where norms are computed.
        layers: names of the layers recorded beside the total.
        preconditioned: whether norms under Adam's preconditioner are recorded too.
        unit: what is counted where it is not examples, such as "tokens".
        missing: what to say where no pair came.
        notes: what a reader must know of this source.
        every: training steps that a row stands for.
    """

    def __init__(
        self,
        source: str,
        model: nn.Module,
        device: torch.device,
        *,
        layers: tuple[str, ...] = (),
        preconditioned: bool = False,
        unit: str | None = None,
        missing: str,
        notes: tuple[Note, ...] = (),
        every: int = 1,
    ) -> None:
        self.source, self._model, self._unit, self._notes = source, model, unit, notes
        self._accumulator = NoiseAccumulator(source, layers, preconditioned, missing, every)
        self._series = 1 + preconditioned + len(layers)
        self._readback = Readback(2 + 2 * self._series, device, self._take)
        self._device = device
        self._trained, self._frozen = dict(trainable(model)), dict(trainable(model, False))
        self._counter: Count | None = None
        self._loss = Loss(model, lambda: None if self._counter is None else self._counter.each)
        if not self.looks:
            self.look_away()
        self._scaler: Any = None
        self._evaluations = Evaluations()
        self._single = 0  # steps whose large batch is no larger than the small one
        self._removals: list[Callable[[], None]] = []

    looks: ClassVar[bool] = True  # at the training's loss

    def look_away(self) -> None:
        """Leave the training's loss alone: somebody else knows it, or sees what goes through its graph."""
        self._loss.remove()

    def count(self, n: float) -> None:
        if self._counter is None:
            raise UsageError(f"count({n!r}): the source {self.source!r} counts for itself. Leave the call out.")
        self._counter.add(n)

    @property
    def noise(self) -> NoiseScale:
        return self._read(self._accumulator.newest)

    @property
    def whole(self) -> NoiseScale:
        """The noise scale of all steps as one, where they are known to be alike."""
        return self._read(self._accumulator.estimate)

    def _read(self, read: Callable[[int, tuple[Note, ...]], NoiseScale]) -> NoiseScale:
        self._settle()
        self._readback.drain()
        found = read(self._single, self._said())
        evaluation = self._counter is not None and self._counter.modes == {False}
        said = confounds(self._model, None, found, training=not evaluation)
        notes = (*found.notes, *self._of_loss(), *said, *self._evaluations.notes)
        return dataclasses.replace(found, notes=notes, unit=self._unit)

    def _of_loss(self) -> tuple[Note, ...]:
        """What the loss makes of a batch, where that is not a mean over examples that count alike."""
        counter = self._counter
        alike = counter is not None and not counter.given
        found = self._loss.notes(COUNTING if alike else None)
        if counter is not None and alike and counter.ignoring and not any("ignore index" in n.text for n in found):
            return (*found, ragged(COUNTING))
        return found

    def detach(self) -> None:
        self._settle()
        for remove in (*self._removals, self._loss.remove):
            remove()
        self._removals.clear()

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        self._readback.drain()
        return {"source": self.source, "single": self._single, "statistics": self._accumulator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("source") != self.source:
            raise UsageError(
                f"noise state of source {state.get('source')!r} for a handle of source {self.source!r}. "
                "Attach with the source it was saved from."
            )
        missing = {"single", "statistics"} - set(state)
        if missing:
            raise UsageError(f"noise state lacks {sorted(missing)}. Load what state_dict() of a handle returned.")
        self._settle()
        self._readback.drain()
        self._accumulator.load_state_dict(state["statistics"])
        self._single = int(state["single"])

    def take_over(self, before: Collector) -> None:
        """Go on from a handle of the same source and model that is detached and measured steps closer to each other."""
        before._readback.drain()
        self._accumulator.take_over(before._accumulator)
        self._single += before._single

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pass under way where this was attached within it."""
        if self._counter is not None:
            self._counter.see(module, args, kwargs)

    # What a source gives and uses.

    @abstractmethod
    def _settle(self) -> None:
        """Bring a step that is complete but not yet a row into the rows. Must not communicate: any rank may read."""

    def _said(self) -> tuple[Note, ...]:
        return self._notes

    def _refuse_changed(self, *, frozen: bool) -> None:
        """Raise UsageError where a parameter began to be trained since attach(), or with `frozen` ceased to be."""
        changed = [name for name, param in self._frozen.items() if param.requires_grad]
        what = "began to be trained"
        if frozen and not changed:
            changed = [name for name, param in self._trained.items() if not param.requires_grad]
            what = "was frozen"
        if changed:
            more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
            raise UsageError(
                f"parameter {changed[0]!r}{more} {what} after attach(), and is not measured rightly. Call the handle's "
                "detach(), after which its noise stays readable, and attach() again."
            )

    @property
    def _scaled(self) -> bool:
        """Whether gradients are those of a scaled loss."""
        return self._scaler is not None

    def _row(self, n_small: Any, n_large: Any, small: Any, large: Any) -> None:
        """One step: counts, and [series] squared norms each: total, preconditioned if kept, layers.

        Tensors on the device, or numbers where the norms were taken on the host.
        """
        if isinstance(small, float):
            self._readback.put((n_small, n_large, small, large))
            return
        if isinstance(small, np.ndarray):
            self._readback.put((n_small, n_large, *small.tolist(), *large.tolist()))
            return
        sizes = torch.empty(2, dtype=torch.float64, device=self._device)
        sizes[0], sizes[1] = n_small, n_large  # numbers are filled in; making a tensor of them would wait
        self._readback.append(torch.cat([sizes, small, large]))

    def _skip(self) -> None:
        self._readback.append(torch.full((2 + 2 * self._series,), math.nan, dtype=torch.float64, device=self._device))

    def _take(self, rows: NDArray[np.float64]) -> None:
        before = 1 + self._accumulator.preconditioned
        if self._series == 1:  # the same, of numbers
            for n_small, n_large, small, large in rows.tolist():
                if not all(map(math.isfinite, (n_small, n_large, small, large))):
                    self._accumulator.skip()
                elif not n_small < n_large:
                    self._single += 1
                else:
                    self._accumulator.update(small, large, n_small, n_large)
            return
        for row in rows:
            pairs = row[2:].reshape(2, -1).T
            if not np.isfinite(row[:2]).all() or not np.isfinite(pairs[0]).all():
                self._accumulator.skip()
            elif not row[0] < row[1]:
                self._single += 1
            else:
                weighted = pairs[1] if self._accumulator.preconditioned else None
                small, large = pairs[0].tolist()
                n_small, n_large = row[:2].tolist()
                own = pairs[before:] if self._accumulator.layers else None
                self._accumulator.update(small, large, n_small, n_large, layers=own, preconditioned=weighted)


def trainable(model: nn.Module, wanted: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that get a gradient, or those that do not; the prefix of a DDP wrapper is left out."""
    for name, param in model.named_parameters():
        if param.requires_grad is wanted:
            yield name.removeprefix("module.") if _wraps(model) else name, param


def _wraps(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)
