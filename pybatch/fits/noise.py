"""The gradient noise scale from pairs of squared gradient norms: arithmetic and interval.

B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", eq. 2.9), where
G is the true gradient and Sigma the covariance of per-example gradients. Both are estimated without bias from mean
gradients over n_small and n_large examples (appendix A.1), averaged separately, and divided once at the end: the mean
of ratios, and clamping before averaging, are both biased. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from pybatch.base.errors import UsageError
from pybatch.base.numerals import counted
from pybatch.records import LayerNoise, NoiseScale, NoiseStatus, Note, WeightedNoise

T = TypeVar("T")
Rows = NDArray[np.float64]

BLOCKS = 32  # blocks an interval is computed from: long enough to absorb autocorrelation, t(31) close to normal
MIN_BLOCKS = 8  # fewer leave the variance itself too uncertain: the interval would be wide and unstable
CONFIDENCE = 0.95
ROUNDING = 1e-5  # of the small batch: norms of bf16 means over equal gradients differ by less
INTERRUPTED = "interrupted before the interval was narrow"
MISSING = "no pair of norms: a step needs two or more micro-batches, each followed by accumulate(n)"
NEGATIVE = (
    "|G|^2 or tr(Sigma) is negative beyond its error: the model has not left its first loss (warm up longer, or raise "
    "learning_rate), the examples of a step are not independent draws, or the counts of examples are wrong"
)


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


@dataclass(frozen=True)
class Ratio:
    """sum(trace) / sum(grad_sq) over blocks, with its 95 % interval or the reason why there is none."""

    status: NoiseStatus
    value: float | None
    low: float | None
    high: float | None
    grad_sq: float | None  # unclamped means
    trace: float | None
    pairs: int
    why: str | None

    def weighted(self) -> WeightedNoise:
        """As the record of a noise scale under another matrix."""
        return WeightedNoise(
            self.value, self.low, self.high, self.grad_sq, self.trace, self.status, self.pairs, self.why
        )


def judge(rows: ArrayLike, small_batch: float | None = None, missing: str = MISSING, negative: str = NEGATIVE) -> Ratio:
    """The ratio of the means over blocks of pairs, its interval, and its status.

    The interval is Fieller's (1954) on the block sums with Student's t: it holds its coverage where the delta method
    does not, because it becomes unbounded by itself when |G|^2 is not separated from zero; that is status
    "lower_bound", and "unresolved" where tr(Sigma) is not separated either.

    Args:
        rows: [m, 3], columns: number of pairs, sum of |G|^2 and sum of tr(Sigma) estimates over the block, in order
            of time. Rows without a pair are ignored.
        small_batch: mean examples behind the small norm; with it, noise below the rounding of fp32 is told from noise.
        missing, negative: the reasons to give where there is no pair at all, and where a mean is below zero.

    Raises:
        UsageError: `rows` has another shape.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 3:
        raise UsageError(
            f"rows of shape {table.shape} are not blocks. Give [m, 3]: count, sum of grad_sq, sum of trace per block."
        )
    table = table[table[:, 0] > 0]
    pairs = int(table[:, 0].sum())
    grad_sq: float | None = None
    trace: float | None = None
    if pairs and bool(np.isfinite(table).all()):
        grad_sq, trace = (table[:, 1:].sum(axis=0) / pairs).tolist()

    def result(
        status: NoiseStatus, value: float | None, low: float | None, high: float | None, why: str | None
    ) -> Ratio:
        return Ratio(status, value, low, high, grad_sq, trace, pairs, why)

    def nothing(why: str) -> Ratio:
        return result("unresolved", None, None, None, why)

    if pairs == 0:
        return nothing(missing)
    if grad_sq is None or trace is None:
        return nothing("a sum of squared norms overflowed: the gradient is not finite")
    if not table[:, 1:].any():
        return nothing("every gradient was zero: the loss does not depend on these parameters here")
    blocks = regroup(table)
    if len(blocks) < MIN_BLOCKS:
        return nothing(f"{counted(len(blocks), 'block')} of pairs: too few for an interval; {MIN_BLOCKS} are the least")
    low, high, case = fieller(blocks)
    if case == "bounded":
        if noiseless(max(abs(low), abs(high)), small_batch):
            return nothing(
                "the gradients of a step are equal within rounding: the same examples were given again, or there is "
                "no noise to measure"
            )
        if trace < 0:
            why = "the estimate of tr(Sigma) is negative within its error: the noise scale is not separated from zero"
            return result("resolved", 0.0, max(low, 0.0), max(high, 0.0), why)
        return result("resolved", float(trace / grad_sq), max(low, 0.0), high, None)
    if case == "above":
        why = "|G|^2 is not separated from zero: only a lower bound is known. More pairs or a larger batch resolve it"
        return result("lower_bound", None, low, None, why)
    reasons = {
        "open": "neither |G|^2 nor tr(Sigma) is separated from zero: too few pairs for this much noise",
        "zero": "the estimates of |G|^2 are zero: the gradient came from one micro-batch of each step alone",
        "negative": negative,
    }
    return nothing(reasons[case])


def noiseless(ratio: float, small_batch: float | None) -> bool:
    """Whether a noise scale is so far below the small batch that its norms differ by no more than rounding."""
    return ratio <= ROUNDING * (small_batch or 0.0)


def estimate(
    rows: ArrayLike,
    *,
    source: str,
    small_batch: float | None = None,
    large_batch: float | None = None,
    skipped: int = 0,
    single: int = 0,
    notes: tuple[Note, ...] = (),
    missing: str = MISSING,
) -> NoiseScale:
    """The noise scale with its 95 % interval from blocks of pairs; `judge` says how.

    Args:
        rows, missing: as for `judge`.
        source: where the norms come from, such as "micro-batches".
        small_batch, large_batch: mean examples behind the two norms, for the record.
        skipped: steps left out for a non-finite gradient.
        single: steps with one micro-batch only, which give no pair.
    """
    if skipped:
        missing = (
            f"no pair of norms: {counted(skipped, 'step')} had a gradient that is not finite, and counted for nothing"
        )
    found = judge(rows, small_batch, missing)
    said = [Note("noise.b_simple", found.why)] if found.why else []  # the first thing to be read of this figure
    said += notes
    if single:
        said.append(
            Note("noise.steps", f"{counted(single, 'step')} had one micro-batch only, which gives no pair of norms")
        )
    return NoiseScale(
        b_simple=found.value,
        low=found.low,
        high=found.high,
        grad_sq=found.grad_sq,
        trace=found.trace,
        status=found.status,
        source=source,
        steps=found.pairs,
        small_batch=small_batch,
        large_batch=large_batch,
        skipped=skipped,
        notes=tuple(said),
    )


def estimate_layers(names: Sequence[str], rows: ArrayLike, small_batch: float | None = None) -> tuple[LayerNoise, ...]:
    """The noise scale of every layer by the same `judge` as the total.

    Args:
        names: of the layers.
        rows: [layers, m, 3], blocks as for `judge`; a layer without a gradient in a step has no pair of that step.
        small_batch: as for `judge`.

    The intervals are per layer: of 100 layers, 5 may be expected to miss their truth.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 3 or table.shape[0] != len(names):
        raise UsageError(f"rows of shape {table.shape} for {len(names)} layers. Give [layers, m, 3].")
    missing = "no pair of norms: the layer had no gradient in a step with two or more micro-batches"
    found = [judge(own, small_batch, missing) for own in table]
    return tuple(
        LayerNoise(name, f.value, f.grad_sq, f.trace, f.low, f.high, f.status, f.pairs, f.why)
        for name, f in zip(names, found, strict=True)
    )


def fieller(blocks: Rows, confidence: float = CONFIDENCE) -> tuple[float, float, str]:
    """Fieller's confidence set of sum(trace) / sum(grad_sq) over blocks [m, 3] (count, grad_sq, trace).

    Returns (low, high, case). "bounded": low..high. "above": low and everything over it. "open": no bound.
    "zero": |G|^2 is exactly zero in every block.
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
    if b + root == 0:
        return math.inf, math.inf, "zero"
    # Unbounded and zero excluded: the roots straddle zero, and the positive one, c / (b + root), is the lower bound.
    return c / (b + root), math.inf, "above"


def regroup(table: Rows) -> Rows:
    """At most BLOCKS blocks of adjacent rows, with counts as even as whole rows allow."""
    if len(table) <= BLOCKS:
        return table
    before = np.cumsum(table[:, 0]) - table[:, 0] / 2  # a row goes where its middle falls
    label = np.minimum((before / table[:, 0].sum() * BLOCKS).astype(int), BLOCKS - 1)
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    return np.add.reduceat(table, starts, axis=0)
