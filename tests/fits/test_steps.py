"""The fit of steps to target: known answers, planted curves with coverage, and what cannot be fitted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from cases.intervals import miss

from pybatch import advise, fit_steps
from pybatch.base.errors import UsageError
from pybatch.fits import steps_model
from pybatch.fits.steps_data import cells, choose_rates, falls_to, stuck
from pybatch.records import Convergence, ConvergencePoint, Curve

INF, NAN = math.inf, math.nan
BATCHES = 2.0 ** np.arange(2, 12)


def hyperbola(batch, s_min=100.0, critical=100.0):
    return s_min * (1 + critical / np.asarray(batch, dtype=float))


def noisy(curve, rng, seeds=3, noise=0.1, shared=0.05):
    """Whole numbers of steps [n, seeds]: log-normal noise of each run, and some that a seed carries to all batches."""
    error = noise * rng.standard_normal((len(curve), seeds)) + shared * rng.standard_normal((1, seeds))
    return np.maximum(np.round(curve[:, None] * np.exp(error)), 1.0)


def test_the_noisy_quadratic_of_zhang_2019():
    """Steps in closed form (d = 100, h = 1/i, c = h, target 0.05, rate tuned over 400), fitted by the hyperbola."""
    steps = [4336, 2178, 1099, 560, 292, 159, 95, 67, 54, 48, 44, 42, 41, 40, 40]
    fit = fit_steps(2 ** np.arange(15), steps, model="hyperbola")
    assert fit.s_min == pytest.approx(39.2, abs=0.06)
    assert fit.critical_batch == pytest.approx(104.7, abs=0.1)
    assert (fit.b20, fit.b50, fit.b_stag) == pytest.approx(np.multiply(fit.critical_batch, (0.2, 1, 4)))
    best = fit_steps(2 ** np.arange(15), steps)
    assert best.rms_log_error < fit.rms_log_error
    assert best.candidates["hyperbola"] > 10  # exact data tell the bend from a hyperbola's


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_isotropic_contraction(spread):
    """With rate eps / (1 + B_n / m) the loss contracts by 1 - eps (2 - eps) / (1 + B_n / m): nearly a hyperbola."""
    noise_scale, rate, ratio = 64.0, 0.02, 0.01
    batch = 2.0 ** np.arange(13)
    steps = np.log(1 / ratio) / -np.log1p(-rate * (2 - rate) / (1 + noise_scale / batch))
    steps *= np.exp(spread * np.random.default_rng(0).standard_normal(len(batch)))
    fit = fit_steps(batch, steps)
    assert fit.critical_batch == pytest.approx(noise_scale, rel=0.03 if not spread else 0.2)  # 1 / rate is not infinite
    assert spread == 0 or fit.low <= noise_scale <= fit.high


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("hyperbola", (50, 100)),
        ("power", (50, 100, 1.5)),
        ("power", (50, 100, 0.7)),
        ("smooth", (50, 100, 2.5)),
        ("u-turn", (50, 100, 2000)),
    ],
)
def test_every_model_is_recognized_and_its_batches_are_what_their_names_say(model, parameters):
    """Twice and 1.2 times the fewest examples, and 10 % saved by doubling: read off the planted curve itself."""
    batch = 2.0 ** np.arange(14)
    log = np.log(np.array([parameters], dtype=float))

    def steps(size):
        return np.exp(steps_model.log_steps(model, log, np.atleast_1d(np.asarray(size, dtype=float)))[0][0])

    fit = fit_steps(batch, steps(batch), resamples=50)
    assert fit.model == model
    assert list(fit.parameters.values()) == pytest.approx(parameters, rel=0.01)
    least = 1.0 if parameters[-1] == 0.7 else 1e-9  # below alpha = 1 examples fall without end
    fewest = np.min((grid := np.geomspace(least, 1e5, 200_001)) * steps(grid))
    assert fit.b20 * steps(fit.b20)[0] == pytest.approx(1.2 * fewest, rel=0.01)
    assert fit.b50 * steps(fit.b50)[0] == pytest.approx(2.0 * fewest, rel=0.01)
    assert steps(2 * fit.b_stag)[0] / steps(fit.b_stag)[0] == pytest.approx(0.9, rel=0.002)
    assert fit.s_min == pytest.approx(steps(np.geomspace(1, 1e9, 2001)).min(), rel=0.01)
    assert any("fewest are taken at batch 1" in n.text for n in fit.notes) == (parameters[-1] == 0.7)


@pytest.mark.parametrize("model", steps_model.MODELS)
def test_jacobians(model):
    p = np.log([[50.0, 90.0, 1.3], [70.0, 300.0, 0.8]])[:, : len(steps_model.NAMES[model])]
    value, slope = steps_model.log_steps(model, p, BATCHES)
    for k in range(p.shape[1]):
        moved = 1e-6 * np.eye(p.shape[1])[k]
        up, down = (steps_model.log_steps(model, p + sign * moved, BATCHES)[0] for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2e-6, slope[..., k], atol=1e-6)
    assert value.shape == (2, len(BATCHES))


@pytest.mark.parametrize(("model", "parameters"), [("hyperbola", (100, 100)), ("smooth", (100, 100, 2))])
def test_the_interval_holds_the_planted_critical_batch(model, parameters):
    """24 repeats of each model: 5 % of the runs diverge, the cap cuts off half of those at the smallest batch."""
    rng, missed, narrow, cut = np.random.default_rng(1), [], 0, 0
    log = np.log(np.array([parameters], dtype=float))
    curve = np.exp(steps_model.log_steps(model, log, BATCHES)[0][0])
    truth = steps_model.figures(model, log, BATCHES.min(), BATCHES.max())[0][2]
    cap = curve[0]
    for seed in range(24):
        steps = noisy(curve, rng)
        cut += int((steps > cap).sum())
        steps = np.where(steps > cap, INF, steps)
        steps = np.where(rng.random(steps.shape) < 0.05, -INF, steps)
        fit = fit_steps(BATCHES, steps, cap=cap, seed=seed, resamples=100)
        missed.append(miss(truth, fit.critical_batch, fit.low, fit.high))
        narrow += fit.low is not None and fit.high is not None and fit.high < 8 * fit.low
    assert sum(m <= 1 for m in missed) >= 22
    assert np.mean(np.square(missed)) < 0.45**2  # intervals for three seeds are wide rather than narrow
    assert narrow >= 18  # an interval that holds all things says nothing
    assert cut > 24


def test_one_seed_has_an_interval_that_holds_too():
    rng, missed = np.random.default_rng(2), []
    for seed in range(60):
        steps = noisy(hyperbola(BATCHES), rng, seeds=1)[:, 0]
        fit = fit_steps(BATCHES, steps, model="hyperbola", seed=seed, resamples=100)
        missed.append(miss(100, fit.critical_batch, fit.low, fit.high))
    assert sum(m <= 1 for m in missed) >= 54
    assert np.mean(np.square(missed)) < 0.6**2


def test_ignoring_the_cap_is_caught():
    """Runs cut off at 700 steps, counted as if they had arrived there, move the answer; counted as censored, not."""
    rng = np.random.default_rng(3)
    steps = noisy(hyperbola(BATCHES), rng, seeds=9, noise=0.3)
    censored = fit_steps(BATCHES, np.where(steps > 700, INF, steps), cap=700, model="hyperbola")
    wrong = fit_steps(BATCHES, np.minimum(steps, 700), model="hyperbola")
    assert abs(math.log(censored.critical_batch / 100)) < 0.2
    assert abs(math.log(wrong.critical_batch / 100)) > 0.35
    assert any("longer than their cap" in note.text for note in censored.notes)


def test_one_strange_batch_does_not_bend_the_fit():
    steps = noisy(hyperbola(BATCHES), np.random.default_rng(4), noise=0.03)
    steps[7] *= 2
    assert fit_steps(BATCHES, steps, model="hyperbola").critical_batch == pytest.approx(100, rel=0.25)


def test_diverged_runs_are_a_label_and_never_a_value():
    steps = noisy(hyperbola(BATCHES), np.random.default_rng(5))
    without = fit_steps(BATCHES, steps, model="hyperbola")
    steps[-1, 0] = -INF
    one = fit_steps(BATCHES, steps, model="hyperbola")
    assert one.critical_batch == pytest.approx(without.critical_batch, rel=0.05)
    assert any("1 of 3 at batch 2048" in note.text for note in one.notes)
    steps[-1] = -INF
    assert fit_steps(BATCHES, steps).batches == len(BATCHES) - 1


def test_perfect_scaling_gives_a_lower_bound_and_no_number():
    fit = fit_steps([8, 16, 32, 64, 128], np.array([[8000, 4000, 2010, 995, 500], [8100, 3950, 2005, 990, 510]]).T)
    assert (fit.model, fit.critical_batch, fit.high, fit.s_min) == ("inverse", None, None, None)
    assert 16 < fit.low <= 128
    assert "above 128, the largest tested" in fit.notes[-1].text
    assert dict(fit.measured_regimes)[16] == "linear"


def test_flat_steps_give_an_upper_bound():
    fit = fit_steps([64, 128, 256, 512, 1024], np.array([[100, 101, 99, 100, 102], [100, 99, 101, 103, 99]]).T)
    assert (fit.model, fit.critical_batch, fit.low) == ("flat", None, None)
    assert fit.high >= 64
    assert "below 64, the smallest tested" in fit.notes[-1].text
    assert {label for _, label in fit.regimes} == {"stagnant"}


def test_regimes_by_model_and_without():
    fit = fit_steps(
        2.0 ** np.arange(1, 13), noisy(hyperbola(2.0 ** np.arange(1, 13)), np.random.default_rng(6), 5, 0.03)
    )
    model, free = dict(fit.regimes), dict(fit.measured_regimes)
    assert (model[2], model[8], model[100 // 2 + 14], model[2048]) == ("linear", "linear", "diminishing", "stagnant")
    assert (free[4], free[64], free[2048]) == ("linear", "diminishing", "stagnant")
    vague = fit_steps(BATCHES, noisy(hyperbola(BATCHES), np.random.default_rng(6), 3, 0.4))
    assert "undetermined" in dict(vague.measured_regimes).values()


def test_the_verdicts_time_to_target_takes_the_fitted_model(run):
    """Where the bend is no hyperbola, S_min (1 + B_c / B) would be off by a third at the critical batch."""
    log = np.log([[100.0, 60.0, 6.0]])
    size = 2.0 ** np.arange(1, 11)
    fit = fit_steps(size, np.exp(steps_model.log_steps("smooth", log, size)[0][0]))
    curve = Curve("tuned", "train", (), fit.s_min, fit.critical_batch, fit.low, fit.high, 0.1, fit=fit)
    points = tuple(
        ConvergencePoint(int(b), float(s), "reached", 3, 0.1, reached=3)
        for b, s in zip(size, np.exp(steps_model.log_steps("smooth", log, size)[0][0]), strict=True)
    )
    verdict = advise(run.capacity, None, Convergence((dataclasses.replace(curve, points=points),)))
    steps = verdict.why("time_to_target").inputs["steps"]
    truth = np.exp(steps_model.log_steps("smooth", log, np.array([float(verdict.best_batch)]))[0][0, 0])
    assert steps == pytest.approx(truth, rel=0.03)
    assert steps < 0.8 * fit.s_min * (1 + fit.critical_batch / verdict.best_batch)


def swept(rng, seeds=4):
    """Steps [rates, n, seeds] with a best rate that grows with batch, and small batches diverging at large rates."""
    rates = np.geomspace(0.01, 1.28, 8)
    best = 0.04 * np.sqrt(BATCHES / 16)
    off = np.abs(np.log(rates[:, None] / best))
    steps = hyperbola(BATCHES) * (1 + off**2)
    table = np.maximum(np.round(steps[..., None] * np.exp(0.05 * rng.standard_normal((*steps.shape, seeds)))), 1)
    table[rates[:, None] > 6 * best] = NAN
    return rates, table


def test_rates_are_chosen_by_the_median_and_anew_in_each_resample():
    rates, table = swept(np.random.default_rng(7))
    chosen = choose_rates(table, np.broadcast_to(rates[:, None], table.shape[:2]))
    assert (np.diff(chosen.index) >= 0).all()
    assert not chosen.edge[2]
    fit = fit_steps(BATCHES, table, rates=rates, model="hyperbola")
    assert fit.low <= 100 <= fit.high
    fixed = fit_steps(BATCHES, table[chosen.index, np.arange(len(BATCHES))], model="hyperbola")
    assert fit.critical_batch == fixed.critical_batch
    assert (fit.low, fit.high) != (fixed.low, fixed.high)


def test_a_best_rate_at_the_edge_is_flagged_and_a_rate_not_tried_is_no_edge():
    rates, table = swept(np.random.default_rng(8))
    fit = fit_steps(BATCHES, table[:4], rates=rates[:4])
    assert any("at the edge of those tried at batch" in note.text and "2048" in note.text for note in fit.notes)
    grid = np.array([[0.1, 0.1], [0.2, 0.2], [NAN, 0.4]])
    steps = np.array([[[9.0], [9.0]], [[8.0], [7.0]], [[NAN], [8.0]]])
    assert choose_rates(steps, grid).edge.tolist() == [True, False]


def test_half_of_the_seeds_must_reach():
    steps = np.array([[[100, INF, INF, INF], [90, 90, 95, INF]], [[300, 300, 300, INF], [400, 400, 400, 400]]])
    chosen = choose_rates(steps)
    assert chosen.index.tolist() == [1, 0]  # faster in a quarter of the seeds is not faster
    assert chosen.median.tolist() == [300, 92.5]
    assert choose_rates(np.array([[[100.0, INF]], [[INF, INF]]])).median.tolist() == [100]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([INF, INF, INF, INF], "no batch size reached the target. Raise the cap"),
        ([NAN, NAN, NAN, NAN], "no run was made"),
        ([-INF, -INF, -INF, NAN], "every run diverged. Lower the learning rates"),
        ([100, 90, INF, INF], "2 of 4 batch sizes reached the target .* a fit needs 3. Raise the cap"),
    ],
)
def test_too_little_for_a_fit_is_said_and_not_guessed(steps, says):
    fit = fit_steps([8, 16, 32, 64], steps)
    assert (fit.model, fit.critical_batch, fit.s_min) == (None, None, None)
    assert fit.notes[0].figure == "critical_batch"
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(fit.notes[0].text)


def test_one_batch_size_needs_more_of_them():
    assert "Measure more batch sizes" in fit_steps([8], [100]).notes[0].text


def test_extrapolations_and_few_steps_are_noted():
    far = fit_steps(BATCHES[:6], hyperbola(BATCHES[:6], 1000, 400))
    assert any("extrapolated: 4" in note.text and note.figure == "critical_batch" for note in far.notes)
    few = fit_steps(BATCHES, np.round(hyperbola(BATCHES, 4, 100)))
    assert any("too coarse" in note.text for note in few.notes)
    thousands = fit_steps(BATCHES, hyperbola(BATCHES, 4, 100))  # not whole: logged in thousands, say
    assert not any("too coarse" in note.text for note in thousands.notes)


def test_the_order_of_batches_is_free_and_the_seed_decides_everything():
    steps = noisy(hyperbola(BATCHES), np.random.default_rng(9))
    assert fit_steps(BATCHES[::-1], steps[::-1]) == fit_steps(BATCHES, steps)
    assert fit_steps(BATCHES, steps, seed=1).low != fit_steps(BATCHES, steps).low


@pytest.mark.parametrize(
    ("batches", "steps", "options", "says"),
    [
        ([8, 16], [100, 90, 80], {}, "steps has shape .3,. for 2 batches"),
        ([8, 8, 16], [100, 90, 80], {}, "batch 8 is given twice"),
        ([0, 8, 16], [100, 90, 80], {}, "batch 0 is not a batch size"),
        ([4, 8, 16], [100, 0, 80], {}, "steps 0 cannot be: the target was met before training"),
        ([4, 8, 16], [100, -7, 80], {}, "steps -7 cannot be"),
        ([4, 8, 16], [[100, 2], [1], [80, 3]], {}, "not a table of numbers"),
        ([4, 8, 16], [100, 90, 80], {"model": "hyperbel"}, "Did you mean 'hyperbola'"),
        ([4, 8, 16], [100, 90, 80], {"cap": 95}, "steps 100 at batch 4 are above the cap of 95"),
        ([4, 8, 16], [100, 90, 80], {"cap": [1, 2]}, "is not a number of steps"),
        ([4, 8, 16], [100, 90, 80], {"resamples": 3}, "resamples 3"),
        ([4, 8, 16], [100, 90, 80], {"rates": [0.1]}, r"Give \[rates, batches, seeds\]"),
        ([4, 8, 16], [[[100], [90], [80]]], {"rates": [-0.1]}, "rates must be positive"),
        ([4, 8, 16], [[[100], [90], [80]]], {"rates": [0.1, 0.2]}, "rates has shape .2,. for steps of 1 rates"),
        ([4, 8, 16], [[[100], [90], [80]]], {"rates": [NAN]}, "without any rate"),
    ],
)
def test_what_cannot_be_steps_is_refused(batches, steps, options, says):
    with pytest.raises(UsageError, match=says):
        fit_steps(batches, steps, **options)


def test_a_rate_that_half_of_the_seeds_reach_comes_after_those_that_all_reach():
    steps = np.array([[[90, math.inf]], [[100, 110]]])
    assert choose_rates(steps).index.tolist() == [1]
    assert choose_rates(steps[:, :, ::-1]).index.tolist() == [1]
    assert choose_rates(np.where(steps < 105, steps, math.inf)).index.tolist() == [0]


def test_steps_that_rise_have_no_critical_batch_among_those_tested():
    batches = np.array([8, 16, 32, 64, 128, 256, 512])
    fit = fit_steps(batches, 50 + 0.1 * batches)
    assert fit.critical_batch is None
    assert fit.high is not None
    assert fit.high >= 8
    assert fit.low is None


@pytest.mark.parametrize("fall", [[[868, 900, 800], [254, 270, 300], [214, 190, 230]], [[178], [97], [80]]])
def test_steps_that_fall_and_then_fail_are_not_flat(fall):
    """A rule whose rate fails at the largest batch: flat is the nearest model, and wrong."""
    failed = [[math.inf] * len(fall[0])]
    fit = fit_steps([8, 32, 128, 512], fall + failed, cap=3472)
    assert (fit.model, fit.s_min, fit.critical_batch, fit.low, fit.high) == (None,) * 5
    assert {label for _, label in fit.regimes} == {"undetermined"}
    assert any("no model fits: steps fall up to batch 128" in n.text for n in fit.notes)
    assert not any("saves no steps" in n.text for n in fit.notes)


@pytest.mark.parametrize("critical", [100, 400, 1e6])
@pytest.mark.parametrize("lost", [2, 4])
def test_a_curve_that_hardly_any_batch_size_is_near_gives_no_critical_batch(critical, lost):
    """A u-turn between steps that fall and runs that do not reach had one, whose interval left the planted one out."""
    batches = 2.0 ** np.arange(1, 12)
    steps = 100 * (1 + critical / batches)
    table = steps[:, None] * np.exp(0.05 * np.random.default_rng(0).standard_normal((11, 3)))
    table[-lost:] = math.inf
    fit = fit_steps(batches, table, cap=4 * steps[0])
    assert (fit.model, fit.critical_batch, fit.low, fit.high) == (None,) * 4
    assert any(f"no model fits: steps fall up to batch {2 ** (11 - lost):,}" in note.text for note in fit.notes)
    fall = fit_steps(batches[:-lost], table[:-lost], cap=4 * steps[0])  # the remedy
    assert fall.low is not None
    assert fall.low < critical < (fall.high or math.inf)


def test_flat_steps_are_still_flat():
    """What decides it needs no fit, and so is asked of many tables."""
    rng, size = np.random.default_rng(3), 2.0 ** np.arange(3, 11)
    for seeds in (1, 3):
        for draw in range(200):
            steps = 100 * np.exp(0.1 * rng.standard_normal((8, seeds)))
            nothing = np.zeros_like(steps)[None]
            assert falls_to(cells(steps[None], nothing, nothing + 1.0, stuck(steps)[None])) is None
            if draw < 4:
                fit = fit_steps(size, steps, resamples=20)
                assert not any("no model fits" in note.text for note in fit.notes)


def test_a_bend_at_the_end_of_the_search_is_told_as_flat():
    fit = fit_steps([8, 32, 128], [[100, 103, 98], [101, 99, 100], [99, 102, 101]], model="hyperbola")
    assert fit.critical_batch is None
    assert not any("extrapolated" in note.text for note in fit.notes)
    assert any("more batch saves no steps" in note.text for note in fit.notes)


def test_steps_that_fall_to_the_largest_batch_are_not_said_to_rise_past_it():
    fit = fit_steps([8, 32, 128], [[16, 28], [39, 29], [14, 19]])
    [text] = [note.text for note in fit.notes if note.figure == "critical_batch"]
    assert fit.model is None
    assert "steps fall up to batch 128, the largest tested, but scatter" in text


def test_a_flat_fit_says_no_less_than_its_interval():
    fit = fit_steps([8, 32, 128, 512], [[31, 27], [24, 26], [29, 33], [22, 26]])
    [text] = [note.text for note in fit.notes if note.figure == "critical_batch"]
    assert fit.model == "flat"
    assert fit.high > 8
    assert f"the critical batch is below {fit.high:.3g}" in text
