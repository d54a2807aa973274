"""Groups of micro-batches, each at fixed parameters, each of which gives one pair of norms."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial

import torch

from pybatch.noise.feeds import Feed, counted
from pybatch.records import NoiseScale, Note
from pybatch.workloads.running.session import Session

ALIKE = 0.02  # possible bias of the noise scale, from which on the record says it: a seventh of the interval aimed at


class Tally:
    """What the examples drawn so far counted for: to convert a noise scale counted in tokens."""

    def __init__(self) -> None:
        self._examples, self._sum, self._squares = 0, 0.0, 0.0
        self._micro_batches, self._own = 0, 0.0

    def add(self, weights: torch.Tensor | None) -> None:
        """A micro-batch with examples of these weights, [n]; None: nothing to convert."""
        if weights is not None:
            self._micro_batches += 1
            self._own += float(weights.square().sum() / weights.sum())
            self._examples += len(weights)
            self._sum += float(weights.sum())
            self._squares += float(weights.square().sum())

    @property
    def mean(self) -> float | None:
        """Mean weight of an example; None where none was weighed."""
        return self._sum / self._examples if self._examples else None

    @property
    def spread(self) -> float:
        """Variance of the weights over their squared mean."""
        return max(self._squares * self._examples / self._sum**2 - 1.0, 0.0) if self._examples else 0.0

    def alike(self, scale: float, k: int) -> float:
        """How many times `scale` the noise scale is where the tokens of an example are all alike; inf: no bound.

        Args:
            scale: as read from pairs that take tokens for independent draws, in tokens.
            k: micro-batches per group.

        The squared norm of a micro-batch of T_i tokens then has r = E[sum T^2 / sum T] / (E[T^2] / E[T]) times the
        noise that goes with its share of the group: over groups of N tokens tr(Sigma) is read (k r - 1) / (k - 1)
        times and |G|^2 with (1 - r) tr(Sigma) / (N - N / k) on top.
        """
        if not self._examples:
            return 1.0
        r = min(self._own / self._micro_batches / (self._squares / self._sum), 1.0)
        more = (k - 1) * self._sum / self._micro_batches  # tokens of a group beyond one micro-batch
        share = (k * r - 1.0) / (k - 1) - scale * (1.0 - r) / more
        return 1.0 / share if share > 0 else math.inf

    @property
    def error(self) -> float:
        """Relative standard error of the mean."""
        if not self._examples:
            return 0.0
        return math.sqrt(self.spread / self._examples)


class MicroBatchGroups:
    """Groups of k micro-batches, all of one size: nothing chosen from the data enters a mean.

    Args:
        session: model and data.
        micro_batch: examples per micro-batch.
        k: micro-batches per group.
        feed: takes the norms.
        between: called after each group: a training step, or None to hold the parameters.
    """

    def __init__(
        self, session: Session, micro_batch: int, k: int, feed: Feed, between: Callable[[], None] | None = None
    ) -> None:
        self.between = between
        self.session, self.micro_batch, self.k, self.feed = session, micro_batch, k, feed
        self.groups = 0
        self.seconds = 0.0  # for all groups, partial ones left out
        self.tally = Tally()
        self.loss = torch.zeros((), dtype=torch.float64, device=session.device)  # sum, each by what it counts for
        self.counted = 0.0

    def run(self, groups: int, deadline: float) -> bool:
        """Measure up to so many groups altogether; False where the deadline came first."""
        start, before = time.monotonic(), self.groups
        while self.groups < groups:
            if not self._group(deadline):
                return False
        self.session.check_finite(self.loss, f"on batches of {self.micro_batch} while the noise was measured")
        if self.groups > before:
            self.seconds += time.monotonic() - start
        return True

    def _group(self, deadline: float) -> bool:
        self.feed.start()
        loss, total = torch.zeros_like(self.loss), 0.0
        for _ in range(self.k):
            if time.monotonic() >= deadline:
                self.feed.start()
                return False
            batch, weights = self.session.weighed_batch(self.micro_batch)
            count = counted(self.micro_batch, weights)
            backward = partial(self.session.backward, batch)
            loss += count * self.feed.micro_batch(backward, self.micro_batch, weights, batch)
            total += count
            self.tally.add(weights)
        self.feed.group()
        self.loss += loss
        self.counted += total
        self.groups += 1
        if self.between is not None:
            self.between()
        return True

    @property
    def group_seconds(self) -> float:
        """Seconds per group."""
        return self.seconds / max(self.groups, 1)

    def result(self) -> NoiseScale:
        """The noise scale of all groups, in examples."""
        found = dataclasses.replace(self.feed.noise, loss=float(self.loss) / self.counted if self.counted else None)
        if self.tally.mean is None:
            return found
        unit = self.session.workload.weight_unit
        factor = self.tally.alike(found.b_simple or found.low or 0.0, self.k)
        if factor > 1 + ALIKE and found.source != "per-example":
            size = "without a bound" if math.isinf(factor) else f"up to {factor:.3g} times"
            text = (
                f"micro-batches differ in their {unit}: too small, {size}, where the {unit} of an example are no "
                "independent draws. source='per-example' is right for both; a larger micro_batch makes it less"
            )
            found = dataclasses.replace(found, notes=(*found.notes, Note("noise.b_simple", text)))
        return dataclasses.replace(found, unit=unit).in_examples(self.tally.mean, self.tally.error)
