"""Peak memory against batch size: a line, or a quadratic where measured peaks bend more than an allocator makes them.

Least squares for both. Allocators hand out memory in steps, so that peaks of exactly linear need lie anywhere up to one
step above a line. Curvature shows where no line has all peaks within a step above it, and a quadratic explains them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pybatch.fits.solver import Array

STEP_BYTES = 20 << 20  # the largest block that torch's CUDA allocator takes for small tensors (kLargeBuffer)
STEP_SHARE = 0.02  # of the growth: many tensors, each with a step of its own, and fragmentation
_LEAST = 3  # batch sizes, without which curvature can't be told


@dataclass(frozen=True)
class MemoryGrowth:
    """Peak bytes of a step against batch size; `square` is None where the line explains the peaks."""

    line: tuple[float, float]  # bytes, bytes per example
    square: tuple[float, float, float] | None  # bytes, per example, per example squared; the last one positive
    residual: float  # root mean square of the peaks about the line, bytes
    unexplained: float | None = None  # height of the strip about the line, where no curve explains the peaks

    @property
    def shape(self) -> str:
        """What it is, for a note."""
        return "line" if self.square is None else "quadratic"

    def peak(self, batch: float) -> float:
        """Bytes predicted at this batch size, never below the line."""
        on_line = self.line[0] + self.line[1] * batch
        if self.square is None:
            return on_line
        a, b, c = self.square
        return max(on_line, a + b * batch + c * batch**2)

    def largest(self, limit: float) -> int:
        """Largest batch size predicted to stay within so many bytes, never above what the line says; 0 for none."""
        on_line = (limit - self.line[0]) / self.line[1]
        if self.square is None:
            return max(0, int(on_line))
        a, b, c = self.square
        inside = b**2 + 4 * c * (limit - a)
        root = (math.sqrt(inside) - b) / (2 * c) if inside >= 0 else 0.0
        return max(0, int(min(on_line, root)))


def fit_memory(batches: Sequence[int], peaks: Sequence[int], *, bends: bool = False) -> MemoryGrowth:
    """Fit peak bytes [n] at batch sizes [n], two different ones at least.

    Args:
        batches, peaks: what was measured.
        bends: the line is known to be wrong far out: curvature counts however small it is.
    """
    n, peak = np.array(batches, dtype=float), np.array(peaks, dtype=float)
    slope, intercept = (float(x) for x in np.polyfit(n, peak, 1))
    residual = float(np.sqrt(np.mean((peak - intercept - slope * n) ** 2)))
    allowed = max(STEP_BYTES, STEP_SHARE * float(np.ptp(peak)))
    strip = _strip(n, peak)
    square = _square(n, peak, math.inf if bends else allowed) if bends or strip > allowed else None
    return MemoryGrowth((intercept, slope), square, residual, strip if strip > allowed and square is None else None)


def _square(n: Array, peak: Array, allowed: float) -> tuple[float, float, float] | None:
    """Coefficients of an upward quadratic, constant first, where it explains the peaks to the bytes allowed."""
    if len(np.unique(n)) < _LEAST:
        return None
    c, b, a = (float(x) for x in np.polyfit(n, peak, 2))
    explained = float(np.ptp(peak - (a + b * n + c * n**2))) <= allowed  # a floor and then a line is no quadratic
    return (a, b, c) if c > 0 and explained else None


def _strip(n: Array, peak: Array) -> float:
    """Height of the lowest strip along any line that holds all points; its slope is that of some pair of them."""
    i, j = np.triu_indices(len(n), 1)
    apart = n[i] != n[j]
    slopes = (peak[j] - peak[i])[apart] / (n[j] - n[i])[apart]
    return float(np.ptp(peak - slopes[:, None] * n, axis=1).min())
