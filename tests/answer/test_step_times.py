"""Curves of step times that those timed leave possible: their shapes, and where the members of each run."""

import dataclasses
import math

import numpy as np
import pytest
from cases.verdicts import BATCHES, capacity, noise, throughput

from pybatch.answer.kriging import kriged
from pybatch.answer.step_times import StepTimes, drawn_step_times, marks, possible
from pybatch.answer.verdict import advise
from pybatch.fits.throughput import fit_throughput
from pybatch.records import BatchPoint

TIMED = 2.0 ** np.arange(13)
MEMBERS = 500


def seen(curve, rng, drift=0.004):
    """Points of a record, of this curve."""
    seconds = curve(TIMED) * np.exp(drift * rng.standard_normal(len(TIMED)))
    return [BatchPoint(int(b), "ok", 1e3 * t, 995 * t, 1005 * t) for b, t in zip(TIMED, seconds, strict=True)]


def drawn(curve, seed=0, size=None):
    """The shapes found, and the members [n, g] at all the sizes, those timed among them."""
    rng = np.random.default_rng(seed)
    points = seen(curve, rng)
    fit = fit_throughput([p.batch for p in points], [[p.step_ms / 1e3] for p in points], resamples=50)
    found = possible(fit, points)
    size = np.unique(np.concatenate([TIMED, np.arange(1.0, 300.0), marks(found)]))
    return found, size, drawn_step_times(MEMBERS, size, found, points, False, rng)


def affine(b):
    return 1e-3 * (1 + b / 100)


def test_where_a_cliff_lies_between_two_sizes_timed_is_open():
    """At 100, of a half: between 64 and 128 some members have it before a batch size, others past it."""
    found, size, members = drawn(lambda b: affine(b) * np.where(b > 100, 1.5, 1.0))
    assert sum(shape.share for shape in found if shape.edge == 64) > 0.9
    over = members - np.log(affine(size))
    risen = {b: float(np.mean(over[:, size == b] > math.log(1.25))) for b in (64, 80, 90, 110, 128)}
    assert risen[64] < 0.01
    assert risen[128] > 0.99
    assert risen[80] == pytest.approx(math.log(80 / 64) / math.log(2), abs=0.08)
    assert risen[90] == pytest.approx(math.log(90 / 64) / math.log(2), abs=0.08)


@pytest.mark.parametrize("scatter", [0.05, 0.15])
def test_on_a_disturbed_machine_the_same_times_leave_more_open(scatter):
    """Taken for errors alone, scatter told less of the curve and made intervals narrower."""
    spread = {}
    for disturbed in (False, True):
        rng = np.random.default_rng(3)
        points = seen(affine, rng, drift=scatter)
        fit = fit_throughput([p.batch for p in points], [[p.step_ms / 1e3] for p in points], resamples=50)
        members = drawn_step_times(MEMBERS, TIMED, possible(fit, points), points, disturbed, rng)
        spread[disturbed] = float(np.mean(members.std(0)))
    assert spread[True] > 1.1 * spread[False]


def test_a_wave_is_used_to_its_end():
    """Waves of 46 examples: 92 take as long as 64, and members say so."""
    found, size, members = drawn(lambda b: 1e-3 * (1 + np.ceil(b / 46)))
    assert sum(shape.share for shape in found if shape.wave is not None) > 0.9
    step = members[:, size == 88] - members[:, size == 64]
    assert abs(float(np.median(step))) < 0.02  # a line has 0.23


def test_of_a_line_nearly_all_members_are_lines():
    found, size, members = drawn(affine)
    assert sum(shape.share for shape in found if shape.wave is None and shape.edge is None) > 0.9
    assert float(np.abs(members.mean(axis=0) - np.log(affine(size))).max()) < 0.02


def test_members_agree_with_what_was_timed_and_none_is_lost():
    for curve in (affine, lambda b: affine(b) * np.where(b > 300, 1.3, 1.0)):
        found, size, members = drawn(curve)
        assert sum(shape.share for shape in found) == pytest.approx(1.0)
        assert len(members) == MEMBERS
        at = np.searchsorted(size, TIMED)
        assert float(np.abs(members[:, at] - np.log(curve(TIMED))).max()) < 0.08


def test_too_few_sizes_leave_the_fitted_shape_alone():
    fit = throughput()
    points = [BatchPoint(b, "ok", 1e3 * fit.step_s(b)) for b in (1, 8, 64)]
    (found,) = possible(fit, points)
    assert (found.share, found.wave, found.edge) == (1.0, None, None)
    assert np.exp(found.unknowns) == pytest.approx([fit.alpha_s, fit.beta_s])


@pytest.mark.parametrize("wave", [None, 48])
@pytest.mark.parametrize("unknowns", [(1e-3, 1e-5), (1e-3, 1e-5, 2e-3)])
def test_slopes_are_those_of_the_curve(unknowns, wave):
    shape, size = StepTimes(np.log(unknowns), 1.0, wave), np.array([1.0, 30, 64, 90, 130, 1000])
    near = 1e-6 * np.eye(len(unknowns))
    rise = (shape.log_s(shape.unknowns + near, size) - shape.log_s(shape.unknowns - near, size)).T / 2e-6
    assert shape.slopes(size) == pytest.approx(rise, abs=1e-6)


def test_shapes_are_dealt_to_members_in_no_order():
    """Members of steps come model by model: with shapes in an order, too, each would go with one model alone."""
    points = seen(affine, np.random.default_rng(0))
    shapes = [StepTimes(np.log([1e-3, 1e-5]), 0.5), StepTimes(np.log([1e-3, 1e-5, 1.0]), 0.5)]
    size = np.append(TIMED, 3.0)
    members = drawn_step_times(MEMBERS, np.sort(size), shapes, points, False, np.random.default_rng(1))
    lines = np.abs(members[:, 2] - math.log(affine(3.0))) < 0.1
    assert 0.3 < lines.mean() < 0.7
    assert abs(lines[: MEMBERS // 2].mean() - lines[MEMBERS // 2 :].mean()) < 0.15


def test_the_order_of_a_records_rows_is_of_no_account():
    fit = throughput()
    times = [1e3 * fit.step_s(b) * (1.6 if b > 100 else 1.0) for b in BATCHES]
    known = capacity(fit, times=times)
    mixed = dataclasses.replace(known, batches=known.batches[::-1])
    assert advise(mixed, noise(40)).text == advise(known, noise(40)).text


def test_the_ends_of_waves_are_on_the_grid():
    unknowns = np.log([1e-3, 1e-5])
    assert {46.0, 92.0, 46.0 * 20} <= set(marks([StepTimes(unknowns, 0.5, 46), StepTimes(unknowns, 0.5)]))
    assert marks([StepTimes(unknowns, 1e-6, 46)]) == []  # no member has it


def test_unknowns_that_a_curve_took_from_the_data_leave_fewer_to_tell_the_misfit_by():
    """Of 8 points that miss the line by 5 %, and a curve that took 4 of them: the misfit is of 2, not of 6."""
    size = np.geomspace(1, 4096, 200)
    x = size[10::25]
    y = np.log(1e-3 * (1 + x / 100)) + 0.05 * (-1.0) ** np.arange(len(x))
    shape, spread = StepTimes(np.log([1e-3, 1e-5]), 1.0), []
    for beside in (0, 4):
        drawn = kriged(
            400, size, lambda p: shape.log_s(p, size), shape.unknowns, shape.slopes(size), shape.unknowns,
            np.full(2, 3.0), 0.7, 0.01, 0.5, x, y, np.full(len(x), 1e-6), np.random.default_rng(0), beside)  # fmt: skip
        spread.append(float(drawn.std(axis=0).mean()))
    assert spread[1] / spread[0] == pytest.approx(math.sqrt(6 / 2), rel=0.15)


@pytest.mark.parametrize(
    "change",
    [
        lambda points: (*points, dataclasses.replace(points[3], step_ms_low=points[3].step_ms)),  # the same batch twice
        lambda points: tuple(dataclasses.replace(p, blocks_ms=(0.0, 1.0), block_rounds=(0, 1)) for p in points),
        lambda points: (*points, dataclasses.replace(points[-1], batch=10**14)),
        lambda points: points[:1] * 8,
    ],
)
@pytest.mark.filterwarnings("error")
def test_rows_that_no_measurement_makes_end_in_no_error(change):
    known = capacity()
    odd = dataclasses.replace(known, batches=change(known.batches))
    assert advise(odd, noise(40)).best_batch is not None


def test_a_fit_whose_times_do_not_grow_is_read():
    flat = dataclasses.replace(throughput(), beta_s=0.0)
    assert np.isfinite(possible(flat, capacity().batches)[0].unknowns).all()
