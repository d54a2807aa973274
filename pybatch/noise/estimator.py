"""The gradient noise scale from pairs of squared gradient norms: arithmetic, accumulator, interval.

B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", eq. 2.9), where
G is the true gradient and Sigma the covariance of per-example gradients. Both are estimated without bias from mean
gradients over n_small and n_large examples (appendix A.1), averaged separately, and divided once at the end: the mean
of ratios, and clamping before averaging, are both biased. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from pybatch.errors import UsageError
from pybatch.records import NoiseScale, NoiseStatus, Note

T = TypeVar("T")
Rows = NDArray[np.float64]

RING = 256  # blocks kept before adjacent ones are merged: 6 KB, and enough that halving leaves more than BLOCKS
BLOCKS = 32  # blocks an interval is computed from: long enough to absorb autocorrelation, t(31) close to normal
MIN_BLOCKS = 8  # fewer leave the variance itself too uncertain: the interval would be wide and unstable
CONFIDENCE = 0.95


def pair(sq_small: T, sq_large: T, n_small: Any, n_large: Any) -> tuple[T, T]:
    """Unbiased (|G|^2, tr Sigma) from the squared norms of two mean gradients; McCandlish 2018, eq. A.2 and A.3.

    Args:
        sq_small: |g|^2 of a mean over n_small examples, itself averaged over the members of the large batch; with
            unequal members weighted by their examples, and n_small = n_large / members.
        sq_large: |g|^2 of the mean over all n_large examples.

    Plain arithmetic: floats, arrays and tensors alike, element by element; either result may be negative.
    """
    small: Any = sq_small
    large: Any = sq_large
    grad_sq = (n_large * large - n_small * small) / (n_large - n_small)
    trace = (small - large) / (1.0 / n_small - 1.0 / n_large)
    return grad_sq, trace


def merge(rows: Rows) -> Rows:
    """Add adjacent rows: [2m, 3] -> [m, 3], a block then being twice as long. An odd last row is kept as it is."""
    even = len(rows) - len(rows) % 2
    return np.concatenate([rows[0:even:2] + rows[1:even:2], rows[even:]])


def estimate(
    rows: ArrayLike,
    *,
    source: str,
    small_batch: float | None = None,
    large_batch: float | None = None,
    skipped: int = 0,
    single: int = 0,
    notes: tuple[Note, ...] = (),
) -> NoiseScale:
    """The noise scale with its 95 % interval from blocks of pairs.

    The estimate is the ratio of the means. The interval is Fieller's (1954) on the block sums with Student's t: it
    holds its coverage where the delta method does not, because it becomes unbounded by itself when |G|^2 is not
    separated from zero; that is status "lower_bound", and "unresolved" where tr(Sigma) is not separated either.

    Args:
        rows: [m, 3], columns: number of pairs, sum of |G|^2 and sum of tr(Sigma) estimates over the block, in order
            of time. Rows without a pair are ignored.
        source: where the norms come from, such as "micro-batches".
        small_batch, large_batch: mean examples behind the two norms, for the record.
        skipped: steps left out for a non-finite gradient.
        single: steps with one micro-batch only, which give no pair.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 3:
        raise UsageError(
            f"rows of shape {table.shape} are not blocks. Give [m, 3]: count, sum of grad_sq, sum of trace per block."
        )
    table = table[table[:, 0] > 0]
    pairs = int(table[:, 0].sum())
    said = list(notes)
    if single:
        said.append(Note("noise.steps", f"{single} steps had one micro-batch only and give no pair of norms"))

    def result(
        status: NoiseStatus, value: float | None, low: float | None, high: float | None, why: str = ""
    ) -> NoiseScale:
        if why:
            said.insert(0, Note("noise.b_simple", why))  # the first thing to be read of this figure
        known = pairs > 0 and bool(np.isfinite(table).all())
        return NoiseScale(
            b_simple=value,
            low=low,
            high=high,
            grad_sq=float(table[:, 1].sum() / pairs) if known else None,
            trace=float(table[:, 2].sum() / pairs) if known else None,
            status=status,
            source=source,
            steps=pairs,
            small_batch=small_batch,
            large_batch=large_batch,
            skipped=skipped,
            notes=tuple(said),
        )

    if pairs == 0:
        why = "no pair of norms: a step needs two or more micro-batches, each followed by accumulate(n)"
        return result("unresolved", None, None, None, why)
    if not np.isfinite(table).all():
        return result("unresolved", None, None, None, "a sum of squared norms overflowed: the gradient is not finite")
    blocks = _regroup(table)
    if len(blocks) < MIN_BLOCKS:
        why = f"{len(blocks)} blocks of pairs are too few for an interval; {MIN_BLOCKS} are the least"
        return result("unresolved", None, None, None, why)

    low, high, case = fieller(blocks)
    ratio = blocks[:, 2].sum() / blocks[:, 1].sum() if blocks[:, 1].sum() else math.nan
    if case == "bounded":
        if ratio < 0:
            why = "the estimate of tr(Sigma) is negative within its error: the noise scale is not separated from zero"
            return result("resolved", 0.0, max(low, 0.0), max(high, 0.0), why)
        return result("resolved", float(ratio), max(low, 0.0), high)
    if case == "above":
        why = "|G|^2 is not separated from zero: only a lower bound is known. More pairs or a larger batch resolve it"
        return result("lower_bound", None, low, None, why)
    reasons = {
        "open": "neither |G|^2 nor tr(Sigma) is separated from zero: too few pairs for this much noise",
        "negative": "|G|^2 or tr(Sigma) is negative beyond its error: the examples of a step are not independent "
        "draws, or the counts given to accumulate(n) are wrong",
    }
    return result("unresolved", None, None, None, reasons[case])


def fieller(blocks: Rows, confidence: float = CONFIDENCE) -> tuple[float, float, str]:
    """Fieller's confidence set of sum(trace) / sum(grad_sq) over blocks [m, 3] (count, grad_sq, trace).

    Returns (low, high, case). "bounded": low..high. "above": low and everything over it. "open": no bound.
    "negative": one of the two means is below zero beyond its error, which no noise scale explains.
    Source: Fieller 1954, "Some Problems in Interval Estimation"; counts weight the blocks, spread gives the variance.
    """
    m, count = len(blocks), blocks[:, 0]
    total = count.sum()
    x, y = (float(v) for v in blocks[:, 1:].sum(axis=0) / total)
    spread = blocks[:, 1:] - count[:, None] * np.array([x, y])
    vxx, vxy, vyy = ((spread.T @ spread)[[0, 0, 1], [0, 1, 1]] * m / (m - 1) / total**2).tolist()
    t2 = float(stdtrit(m - 1, 0.5 + confidence / 2)) ** 2  # Student's t
    # The set is { r : a r^2 - 2 b r + c <= 0 }: those r for which y - r x is not separated from zero.
    a, b, c = x * x - t2 * vxx, x * y - t2 * vxy, y * y - t2 * vyy
    if (x < 0 and a > 0) or (y < 0 and c > 0):
        return -math.inf, math.inf, "negative"
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0:
        return (b - root) / a, (b + root) / a, "bounded"
    if c <= 0:
        return -math.inf, math.inf, "open"
    # Unbounded and zero excluded: the roots straddle zero, and the positive one, c / (b + root), is the lower bound.
    return c / (b + root), math.inf, "above"


def _regroup(table: Rows) -> Rows:
    """At most BLOCKS blocks of adjacent rows, with counts as even as whole rows allow."""
    if len(table) <= BLOCKS:
        return table
    before = np.cumsum(table[:, 0]) - table[:, 0] / 2  # a row goes where its middle falls
    label = np.minimum((before / table[:, 0].sum() * BLOCKS).astype(int), BLOCKS - 1)
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    return np.add.reduceat(table, starts, axis=0)


@dataclass
class NoiseAccumulator:
    """Pairs of squared norms as they come, in constant memory: blocks of pairs, adjacent ones merged when RING is full.

    The fused optimizers keep the same ring on the device; this one is for a loop of one's own.
    """

    source: str = "pairs"

    def __post_init__(self) -> None:
        self._ring: Rows = np.zeros((RING, 3))
        self._block = 1  # steps per block
        self._steps = 0  # steps since the start of the ring, skipped ones included
        self._sizes = np.zeros(2)
        self.skipped = 0

    def update(self, sq_small: float, sq_large: float, n_small: float, n_large: float) -> None:
        """One pair: squared norms of mean gradients over n_small and n_large examples. Non-finite norms are skipped.

        Raises UsageError unless 0 < n_small < n_large.
        """
        if not 0 < n_small < n_large < math.inf:
            raise UsageError(
                f"n_small {n_small} and n_large {n_large}: a pair needs 0 < n_small < n_large. "
                "Split the step into two or more micro-batches."
            )
        if not (math.isfinite(sq_small) and math.isfinite(sq_large)):
            self.skip()
            return
        self._add([1.0, *pair(float(sq_small), float(sq_large), n_small, n_large)])
        self._sizes += n_small, n_large

    def skip(self) -> None:
        """A step without a usable gradient: counted, and it keeps its place in time."""
        self.skipped += 1
        self._add([0.0, 0.0, 0.0])

    def _add(self, row: list[float]) -> None:
        if self._steps == RING * self._block:
            self._ring[: RING // 2] = merge(self._ring)
            self._ring[RING // 2 :] = 0.0
            self._block *= 2
        self._ring[self._steps // self._block] += row
        self._steps += 1

    @property
    def rows(self) -> Rows:
        """Blocks so far, [m, 3]: count, sum of grad_sq, sum of trace."""
        return self._ring[: -(-self._steps // self._block)].copy()

    def estimate(self) -> NoiseScale:
        """The noise scale of everything seen so far."""
        pairs = self._ring[:, 0].sum()
        small, large = (self._sizes / pairs).tolist() if pairs else (None, None)
        return estimate(self.rows, source=self.source, small_batch=small, large_batch=large, skipped=self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain types."""
        return {
            "ring": self._ring.tolist(),
            "block": self._block,
            "steps": self._steps,
            "sizes": self._sizes.tolist(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises UsageError on a state of another shape."""
        missing = {"ring", "block", "steps", "sizes", "skipped"} - set(state)
        ring = np.array(state.get("ring", ()), dtype=np.float64)
        if missing or ring.shape != (RING, 3):
            raise UsageError(
                f"noise state lacks {sorted(missing)} or has ring shape {ring.shape}. Load what state_dict() returned."
            )
        self._ring, self._sizes = ring, np.array(state["sizes"], dtype=np.float64)
        self._block, self._steps, self.skipped = int(state["block"]), int(state["steps"]), int(state["skipped"])
