"""What must hold for any numbers a user may give to `fit_steps`: no error but a UsageError, and figures in order."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from cases.intervals import miss
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from pybatch import fit_steps
from pybatch.base.errors import UsageError
from pybatch.records import StepsFit

INF, NAN = math.inf, math.nan
SOME = settings(
    max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)  # shrinking repeats a fit hundreds of times
FEW = settings(SOME, max_examples=10)  # of several fits each: what is wrong of curves is wrong of the first few
WILD = st.one_of(
    st.sampled_from([INF, NAN, 1.0, 1e12, 1e-9, 3.0]),
    st.integers(1, 10**6),
    st.floats(1e-3, 1e9, allow_nan=False),
)


def fitted(*arguments: object, **options: object) -> StepsFit:
    return fit_steps(*arguments, resamples=40, **options)  # type: ignore[arg-type]


def in_order(fit: StepsFit) -> None:
    """Every figure lies in its interval, and every figure that is missing has a note."""
    for value, low, high in (
        (fit.s_min, fit.s_min_low, fit.s_min_high),
        (fit.critical_batch, fit.low, fit.high),
        (fit.b20, fit.b20_low, fit.b20_high),
        (fit.b_stag, fit.b_stag_low, fit.b_stag_high),
    ):
        known = [v for v in (low, value, high) if v is not None]
        assert known == sorted(known)
        assert all(math.isfinite(v) and v > 0 for v in known)
    assert fit.critical_batch is not None or any(note.figure == "critical_batch" for note in fit.notes)


@SOME
@given(st.data())
def test_any_table_gives_a_fit_in_order_or_a_usage_error(data: st.DataObject) -> None:
    n, seeds = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    batches = data.draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n, unique=True))
    steps = [data.draw(st.lists(WILD, min_size=seeds, max_size=seeds)) for _ in range(n)]
    in_order(fitted(batches, steps))


@SOME
@given(st.data())
def test_any_numbers_at_all_give_a_fit_or_a_usage_error(data: st.DataObject) -> None:
    number = st.one_of(WILD, st.floats(), st.integers(-5, 5), st.sampled_from([1e300, 1e-300]))
    n = data.draw(st.integers(0, 5))
    batches = data.draw(st.lists(number, min_size=n, max_size=n))
    steps = data.draw(st.lists(number, min_size=max(0, n - data.draw(st.integers(0, 1))), max_size=n))
    try:
        fit = fitted(batches, steps)
    except UsageError:
        return
    in_order(fit)


def curve(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes [n] and noisy steps [n, seeds] around a hyperbola."""
    n, seeds = draw(st.integers(4, 9)), draw(st.integers(1, 4))
    critical, noise = draw(st.floats(0.1, 1e4)), draw(st.sampled_from([0.01, 0.1, 0.3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batches = 2.0 ** np.arange(3, 3 + n)
    steps = 200 * (1 + critical / batches)[:, None] * np.exp(noise * rng.standard_normal((n, seeds)))
    return batches, steps


CURVES = st.composite(curve)()


def same(a: StepsFit, b: StepsFit, batch: float = 1.0, steps: float = 1.0) -> None:
    assert a.model == b.model
    for name in ("critical_batch", "low", "high", "b20", "b_stag"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or y == pytest.approx(batch * x, rel=1e-3)
    assert a.s_min is None or b.s_min == pytest.approx(steps * a.s_min, rel=1e-3)
    assert [label for _, label in a.regimes] == [label for _, label in b.regimes]


@FEW
@given(CURVES, st.sampled_from([1 / 64, 3.0, 1000.0]), st.sampled_from([0.01, 7.0, 1e4]))
def test_units_of_batch_and_step_carry_over(
    data: tuple[np.ndarray, np.ndarray], per_batch: float, per_step: float
) -> None:
    """Tokens for sequences, thousands of steps for steps: the answer is the same in the other unit."""
    batches, steps = data
    same(fitted(batches, steps), fitted(per_batch * batches, per_step * steps), per_batch, per_step)


@FEW
@given(CURVES, st.randoms(use_true_random=False))
def test_the_order_of_batches_seeds_and_rates_is_free(data: tuple[np.ndarray, np.ndarray], random: Random) -> None:
    batches, steps = data
    order = list(range(len(batches)))
    random.shuffle(order)
    whole = fitted(batches, steps)
    assert fitted(batches[order], steps[order]) == whole
    if steps.shape[1] > 1:
        turned = fitted(batches, steps[:, ::-1])
        assert turned.model == whole.model
        if whole.critical_batch is not None:
            assert turned.critical_batch == pytest.approx(whole.critical_batch, rel=1e-6)
    turn = random.choice([1, -1])
    slower, rates = np.stack([steps, 1.5 * steps])[::turn], np.array([0.1, 0.2])[::turn]
    same(whole, fitted(batches, slower, rates=rates))


@FEW
@given(CURVES)
def test_steps_that_never_fall_have_no_critical_batch_above_the_smallest(data: tuple[np.ndarray, np.ndarray]) -> None:
    """Sorted to rise with the batch: more batch saves nothing, whatever the numbers."""
    batches, steps = data
    fit = fitted(batches, np.sort(steps, axis=0))
    assert fit.critical_batch is None or fit.critical_batch <= batches[0]
    assert fit.low is None or fit.low <= batches[0]


@pytest.mark.parametrize("count", range(4, 10))
def test_steps_that_fall_as_one_over_the_batch_have_none_below_the_largest(count: int) -> None:
    batches = 2.0 ** np.arange(3, 3 + count)
    fit = fitted(batches, 1e6 / batches)
    assert (fit.model, fit.critical_batch, fit.high) == ("inverse", None, None)
    assert fit.low == batches[-1]


@FEW
@given(CURVES, st.floats(0.0, 0.99))
def test_evaluations_just_before_change_nothing_and_early_ones_widen(
    data: tuple[np.ndarray, np.ndarray], share: float
) -> None:
    batches, steps = data
    assume(steps.shape[1] > 1)
    exact = fitted(batches, steps, model="hyperbola")
    same(exact, fitted(batches, steps, before=steps * (1 - 1e-9), model="hyperbola"))
    same(exact, fitted(batches, steps, before=np.full_like(steps, NAN), model="hyperbola"))
    in_order(fitted(batches, steps, before=share * steps))


def test_whole_numbers_and_floats_and_lists_and_arrays_are_the_same() -> None:
    steps = [[2100, 2000], [1100, 1000], [600, 550], [330, 340]]
    fit = fitted([8, 16, 32, 64], steps)
    assert fitted(np.array([8.0, 16, 32, 64]), np.array(steps, dtype=np.float32)) == fit
    assert fitted(np.array([8, 16, 32, 64], dtype=np.int16), np.array(steps, dtype=np.int64)) == fit


def test_noise_that_grows_or_falls_with_the_batch_is_no_obstacle() -> None:
    """The error is taken as the same at every batch size; where it is not, the interval still holds the truth."""
    batches, missed = 2.0 ** np.arange(2, 12), {1: [], -1: []}
    for sign in missed:
        rng = np.random.default_rng(3)
        spread = 0.1 * 3.0 ** (sign * np.linspace(-1, 1, len(batches)))
        for seed in range(30):
            steps = 100 * (1 + 100 / batches)[:, None] * np.exp(spread[:, None] * rng.standard_normal((10, 3)))
            fit = fitted(batches, steps, model="hyperbola", seed=seed)
            missed[sign].append(miss(100, fit.critical_batch, fit.low, fit.high))
        assert sum(m <= 1 for m in missed[sign]) >= 27
        assert np.mean(np.square(missed[sign])) < 0.6**2
