"""Pairs of squared gradient norms as they come, in constant memory; every source of the noise scale feeds this.

The fused optimizers keep the same ring on the device. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pybatch.base.errors import UsageError
from pybatch.fits.noise import BLOCKS, MISSING, estimate, estimate_layers, judge, merge, pair
from pybatch.fits.stretch import coarse, drift_note, newest, trajectory
from pybatch.records import NoiseScale, Note

RING = 256  # blocks kept before adjacent ones are merged: 6 KB, and enough that halving leaves more than BLOCKS
NO_MOMENTS = "no pair of norms under the preconditioner: its moments need a step before"
LAYER_RING = 2 * BLOCKS  # 1.5 KB a layer; half full it still gives an interval every block it uses


class Ring:
    """Sums per block of steps for many series at once: [rows, series, 3]; when full, adjacent blocks are merged."""

    def __init__(self, rows: int, series: int) -> None:
        self._sums = np.zeros((rows, series, 3))
        self._block = 1  # steps per block
        self._steps = 0

    def add(self, step: NDArray[np.float64]) -> None:
        """One step: [series, 3], count, grad_sq and trace; zeros keep its place in time."""
        if self._steps == len(self._sums) * self._block:
            half = len(self._sums) // 2
            self._sums[:half] = merge(self._sums)
            self._sums[half:] = 0.0
            self._block *= 2
        self._sums[self._steps // self._block] += step
        self._steps += 1

    @property
    def length(self) -> int:
        """Steps a block holds; the last may hold fewer."""
        return self._block

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._steps

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and series, as given."""
        return self._sums.shape[0], self._sums.shape[1]

    @property
    def rows(self) -> NDArray[np.float64]:
        """Blocks so far: [series, blocks, 3]."""
        return self._sums[: -(-self._steps // self._block)].transpose(1, 0, 2).copy()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return {"sums": self._sums.tolist(), "block": self._block, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; raises UsageError on a state of another shape."""
        missing = {"sums", "block", "steps"} - set(state)
        sums = np.array(state.get("sums", ()), dtype=np.float64)
        if missing or sums.size != self._sums.size or (sums.size and sums.shape != self._sums.shape):
            raise UsageError(
                f"noise state lacks {sorted(missing)} or has shape {sums.shape} where {self._sums.shape} is kept. "
                "Load what state_dict() of the same source, model and options returned."
            )
        self._sums = sums.reshape(self._sums.shape)
        self._block, self._steps = int(state["block"]), int(state["steps"])


class NoiseAccumulator:
    """Pairs of squared norms in, the noise scale out; constant memory.

    Args:
        source: where the norms come from, for the record.
        layers: names of the layers whose norms are given beside the total.
        preconditioned: whether norms under Adam's preconditioner are given too.
        missing: what to say where no pair came.
        every: training steps that a pair stands for.
    """

    def __init__(
        self,
        source: str = "pairs",
        layers: tuple[str, ...] = (),
        preconditioned: bool = False,
        missing: str = MISSING,
        every: int = 1,
    ) -> None:
        self.every = every
        self._place, self._behind = every, 0.0  # training steps of a place in the ring; places before the next pair
        self.source, self.layers, self.preconditioned, self.missing = source, layers, preconditioned, missing
        self._total = Ring(RING, 2 if preconditioned else 1)
        self._layers = Ring(LAYER_RING, len(layers))
        self._sizes = np.zeros(2)
        self._pairs = 0
        self.skipped = 0

    def update(
        self,
        sq_small: float,
        sq_large: float,
        n_small: float,
        n_large: float,
        *,
        layers: ArrayLike | None = None,
        preconditioned: ArrayLike | None = None,
    ) -> None:
        """One pair: squared norms of mean gradients over n_small and n_large examples. Non-finite norms are skipped.

        Args:
            sq_small, sq_large, n_small, n_large: as for `estimator.pair`.
            layers: [layers, 2], the small and the large norm of each; NaN where a layer had no gradient.
            preconditioned: [2], the same under the preconditioner.

        Raises:
            UsageError: unless 0 < n_small < n_large, or where `layers` does not match the names.
        """
        if not 0 < n_small < n_large < math.inf:
            raise UsageError(
                f"n_small {n_small} and n_large {n_large}: a pair needs 0 < n_small < n_large. "
                "Split the step into two or more micro-batches."
            )
        if not (math.isfinite(sq_small) and math.isfinite(sq_large)):
            self.skip()
            return
        if self.layers or layers is not None:
            own = np.full((len(self.layers), 2), np.nan) if layers is None else np.asarray(layers, dtype=np.float64)
            if own.shape != (len(self.layers), 2):
                raise UsageError(f"layers of shape {own.shape} for {len(self.layers)} names. Give [layers, 2].")
        self._catch_up()
        if self.layers:
            self._layers.add(_pairs(own, n_small, n_large))
        if self.preconditioned:
            weighted = [math.nan] * 2 if preconditioned is None else np.asarray(preconditioned).tolist()
            self._total.add(_pairs(np.array([[sq_small, sq_large], weighted]), n_small, n_large))
        else:
            self._total.add(np.array([(1.0, *pair(sq_small, sq_large, n_small, n_large))]))
        self._sizes += n_small, n_large
        self._pairs += 1
        self._behind += self.every / self._place - 1

    def skip(self) -> None:
        """A step without a usable gradient: counted, and it keeps its place in time."""
        self.skipped += 1
        self._catch_up()
        self._pass(1)
        self._behind += self.every / self._place - 1

    def _pass(self, places: int) -> None:
        """Leave so many places of the rings empty."""
        for ring in (self._total, self._layers):
            for _ in range(places):
                ring.add(np.zeros((ring.shape[1], 3)))

    def _catch_up(self) -> None:
        """Where this one took over from steps closer to each other, a pair is several places on from the last."""
        self._pass(int(self._behind))
        self._behind %= 1

    def take_over(self, before: NoiseAccumulator) -> None:
        """Begin with the pairs of one that had the same series, of steps closer to each other."""
        self.load_state_dict(before.state_dict())
        self._place = before._place

    @property
    def rows(self) -> NDArray[np.float64]:
        """Blocks so far, [m, 3]: count, sum of grad_sq, sum of trace."""
        rows: NDArray[np.float64] = self._total.rows[0]
        return rows

    def estimate(self, single: int = 0, notes: tuple[Note, ...] = ()) -> NoiseScale:
        """The noise scale of everything seen so far."""
        return self._read(0, single, notes)

    def newest(self, single: int = 0, notes: tuple[Note, ...] = ()) -> NoiseScale:
        """The noise scale of the newest stretch that gives an interval, and the whole run as its trajectory."""
        ring, place = self._total, self._place
        rows = ring.rows[0]
        first = newest(rows, self._sizes[0] / self._pairs if self._pairs else None)
        start, end = first * ring.length * place + 1, ring.steps * place
        found = self._read(first, single, (*drift_note(rows[first:]), *notes))
        if not ring.steps:
            return found
        run = trajectory(rows, ring.length * place, end)
        return dataclasses.replace(found, first_step=start, last_step=end, trajectory=run)

    def _read(self, first: int, single: int, notes: tuple[Note, ...]) -> NoiseScale:
        """Of the rows from the first on."""
        small, large = (self._sizes / self._pairs).tolist() if self._pairs else (None, None)
        total = estimate(
            self.rows[first:],
            source=self.source,
            small_batch=small,
            large_batch=large,
            skipped=self.skipped,
            single=single,
            notes=notes,
            missing=self.missing,
        )
        blocks = self._layers.rows
        start = coarse(first * self._total.length // self._layers.length, blocks.shape[1])
        layers = estimate_layers(self.layers, blocks[:, start:], small) if self.layers else ()
        weighted = judge(self._total.rows[1][first:], small, NO_MOMENTS).weighted() if self.preconditioned else None
        return dataclasses.replace(total, layers=layers, preconditioned=weighted)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain types."""
        return {
            "total": self._total.state_dict(),
            "layers": self._layers.state_dict(),
            "sizes": self._sizes.tolist(),
            "pairs": self._pairs,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises UsageError on a state of another shape, and keeps its own then."""
        missing = {"total", "layers", "sizes", "pairs", "skipped"} - set(state)
        if missing:
            raise UsageError(f"noise state lacks {sorted(missing)}. Load what state_dict() returned.")
        total, layers = (Ring(*ring.shape) for ring in (self._total, self._layers))
        total.load_state_dict(state["total"])
        layers.load_state_dict(state["layers"])
        self._total, self._layers = total, layers
        self._sizes = np.array(state["sizes"], dtype=np.float64)
        self._pairs, self.skipped = int(state["pairs"]), int(state["skipped"])


def _pairs(norms: NDArray[np.float64], n_small: float, n_large: float) -> NDArray[np.float64]:
    """Norms [series, 2] to [series, 3]: count, |G|^2, tr(Sigma); zeros where a norm is not finite."""
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(norms).all(axis=1))
    norms = np.where(usable[:, None], norms, 0.0)
    return np.stack([usable.astype(np.float64), *pair(norms[:, 0], norms[:, 1], n_small, n_large)], axis=1)
