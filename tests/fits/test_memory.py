"""Peak memory against batch size: planted lines stay lines under any allocator's steps, planted quadratics show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybatch.fits.memory import STEP_BYTES, MemoryGrowth, fit_memory

MiB = 1 << 20
GiB = 1 << 30
LADDERS = [(64, 128, 256, 512), (1, 8, 64, 512), (100, 200, 300, 400), (512, 1024, 2048), (3, 7, 1000, 1001)]


def stepped(value: float, step: int) -> int:
    return math.ceil(value / step) * step


@pytest.mark.parametrize("batches", LADDERS)
def test_an_exact_line_comes_back(batches: tuple[int, ...]) -> None:
    growth = fit_memory(batches, [50 * MiB + 3 * MiB * n for n in batches])
    assert growth.square is growth.unexplained is None
    assert growth.line == pytest.approx((50 * MiB, 3 * MiB))
    assert growth.largest(40 * GiB) == pytest.approx((40 * GiB - 50 * MiB) / (3 * MiB), abs=1)
    assert growth.peak(10_000) == pytest.approx(50 * MiB + 10_000 * 3 * MiB)


@pytest.mark.parametrize("step", [2 * MiB, STEP_BYTES])
@given(
    base=st.floats(0, 2 * GiB),
    slope=st.floats(1e4, 1e8),
    batches=st.lists(st.integers(1, 4096), min_size=3, max_size=4, unique=True),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_line_in_an_allocators_steps_stays_a_line(step: int, base: float, slope: float, batches: list[int]) -> None:
    batches.sort()
    assert fit_memory(batches, [stepped(base + slope * n, step) for n in batches]).square is None


@pytest.mark.parametrize("batches", LADDERS)
@given(seed=st.integers(0, 2**32 - 1), slope=st.floats(1e4, 1e8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_line_stays_a_line_wherever_in_a_step_its_peaks_lie(
    batches: tuple[int, ...], seed: int, slope: float
) -> None:
    """The property the test for curvature rests on, whatever the allocator does within its step."""
    above = np.random.default_rng(seed).integers(0, STEP_BYTES, len(batches))
    above[:: len(above) - 1] = STEP_BYTES - 1  # both ends high or the middle high: the most a step can bend
    for lift in (above, STEP_BYTES - 1 - above):
        peaks = [int(slope * n) + int(more) for n, more in zip(batches, lift, strict=True)]
        assert fit_memory(batches, peaks).square is None


@pytest.mark.parametrize("step", [1, 2 * MiB, STEP_BYTES])
@pytest.mark.parametrize("batches", [(512, 1024, 2048, 4096), (1024, 2048, 4096)])
def test_a_quadratic_shows_and_predicts_the_largest_batch(step: int, batches: tuple[int, ...]) -> None:
    def true(n: float) -> float:
        # Eight float32 matrices of batch x batch: the bend is above two steps, so that no step can hide it.
        return 200 * MiB + 40_000 * n + 32 * n**2

    growth = fit_memory(batches, [stepped(true(n), step) for n in batches])
    assert growth.square is not None
    found, on_line = growth.largest(40 * GiB), MemoryGrowth(growth.line, None, 0.0).largest(40 * GiB)
    exact = (-40_000 + math.sqrt(40_000**2 + 128 * (40 * GiB - 200 * MiB))) / 64
    assert found == pytest.approx(exact, rel=0.12 if step > 1 else 1e-4)
    assert on_line > 3 * exact  # what it would have been
    assert growth.peak(found) <= 40 * GiB < growth.peak(found + 1)


def test_two_points_give_a_line() -> None:
    assert fit_memory([100, 4000], [GiB, 9 * GiB]).square is None
    assert fit_memory([100, 100, 4000], [GiB, GiB + 100 * MiB, 9 * GiB]).square is None


def test_a_bend_downward_stays_a_line() -> None:
    batches = (512, 1024, 2048, 4096)
    assert fit_memory(batches, [int(GiB * math.sqrt(n)) for n in batches]).square is None


@pytest.mark.parametrize("last_flat", [1, 2])
def test_a_floor_and_then_a_line_is_no_quadratic(last_flat: int) -> None:
    """Small batches peak in the optimizer's update: their memory does not grow, and nothing is quadratic about it."""
    batches = (64, 128, 256, 512)
    peaks = [max(GiB, GiB + 4 * MiB * (n - 1.0 * batches[last_flat])) for n in batches]
    growth = fit_memory(batches, [int(p) for p in peaks])
    assert growth.square is None
    assert growth.unexplained is not None
    assert growth.unexplained > STEP_BYTES


@given(
    peaks=st.lists(st.integers(1, 64 * GiB), min_size=4, max_size=4, unique=True),
    limit=st.integers(1, 1 << 44),
    n=st.integers(1, 1 << 20),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_prediction_is_above_the_lines(peaks: list[int], limit: int, n: int) -> None:
    growth = fit_memory((512, 1024, 2048, 4096), sorted(peaks))
    line = MemoryGrowth(growth.line, None, 0.0)
    assert growth.largest(limit) <= line.largest(limit)
    assert growth.peak(n) >= line.peak(n)
