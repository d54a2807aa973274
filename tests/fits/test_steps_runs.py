"""Runs as people have them: stuck ones, as many as there are at each batch size, one entry a run, on a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pybatch import fit_steps, fit_steps_csv
from pybatch.base.errors import UsageError
from pybatch.fits.steps_csv import read_runs
from pybatch.fits.steps_data import best_rate, stuck
from pybatch.fits.steps_resampling import _drawn
from pybatch.jobs.fit import run_fit

INF, NAN = math.inf, math.nan
BATCHES = 2.0 ** np.arange(3, 12)
CURVE = 100 * (1 + 100 / BATCHES)


def runs(rng, seeds=3, noise=0.05, curve=CURVE):
    return np.round(curve[:, None] * np.exp(noise * rng.standard_normal((len(curve), seeds))))


@pytest.mark.parametrize("cell", [(0, 0), (4, 1), (8, 2)])
@pytest.mark.parametrize(("late", "cap"), [(INF, 1400), (INF, 1e9), (30_000, None), (4_000, 1e6)])
def test_one_stuck_run_of_27_moves_nothing(cell, late, cap):
    steps = runs(np.random.default_rng(0))
    without = fit_steps(BATCHES, steps, model="hyperbola", resamples=60)
    steps[cell] = late
    fit = fit_steps(BATCHES, steps, cap=cap, model="hyperbola", resamples=60)
    assert fit.critical_batch == pytest.approx(without.critical_batch, rel=0.05)
    assert fit.high / fit.low < 1.7
    assert fit.rms_log_error is not None
    batch = f"1 of 3 at batch {BATCHES[cell[0]]:g}"
    assert any("stuck" in note.text and batch in note.text for note in fit.notes) == (cap != 1400 or cell != (0, 0))


def test_what_most_runs_share_is_stuck_at_one_batch_size_between_others_alone():
    def late(*rows):
        return stuck(np.array(rows)).all(-1).tolist()

    assert stuck(np.array([[10, 11, 90.0], [5, 10, 12], [INF, 4, 5]])).tolist() == [
        [False, False, True], [False, False, True], [True, False, False]]  # fmt: skip
    low, high, lost, nobody, diverged = [10, 11.0], [40, 41.0], [INF, INF], [NAN, NAN], [-INF, -INF]
    assert late(low, high, low, lost, low) == [False, True, False, True, False]
    assert late(low, nobody, lost, low) == [False, False, True, False]
    assert not any(late(high, low, [14, 15.0], low, high))  # its edges, and what seeds may differ by
    assert not any(late(low, lost, lost, low)), "two in a row are how the problem is"
    assert not any(late(low, low, lost, lost))
    assert not any(late(low, lost, diverged, low))
    alone = stuck(np.array([[9.0], [90.0], [5.0], [INF], [4.0], [40.0]]))[:, 0]
    assert alone.tolist() == [False, True, False, True, False, False]  # the last may be the problem's own rise


@pytest.mark.parametrize(("seeds", "many"), [(3, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("late", [INF, 6.0])
def test_one_batch_size_stuck_between_others_destroys_no_fit(seeds, many, late):
    """Of 8 draws as many held their critical batch as 2, and some were told that it is above all tested."""
    held, batches = 0, 2.0 ** np.arange(2, 11)
    for draw in range(8):
        rng = np.random.default_rng(100 + draw)
        critical = np.exp(rng.uniform(np.log(20), np.log(400)))
        steps = runs(rng, seeds, 0.06, 200 * (1 + critical / batches))
        at = int(rng.integers(1, 8))
        steps[at, :many] *= late
        fit = fit_steps(batches, steps, cap=6 * steps[np.isfinite(steps)].max(), resamples=60)
        held += fit.model is not None and fit.low <= critical <= (fit.high or INF)
        [told] = [note.text for note in fit.notes if "stuck" in note.text]
        assert f"{many} of {seeds} at batch {batches[at]:g}" in told
        assert not any("throughout" in note.text for note in fit.notes)
    assert held >= 7


def test_a_batch_size_stuck_at_every_rate_widens_nothing():
    """Each rate is the best on one side of it: its own row alone would not tell."""
    small = (BATCHES < 64)[:, None]
    steps = runs(np.random.default_rng(1))
    both = np.stack([np.where(small, steps, -INF), np.where(small, -INF, steps)])
    without = fit_steps(BATCHES, both, rates=[0.1, 0.2], model="hyperbola", resamples=60)
    both[:, 3] = INF
    fit = fit_steps(BATCHES, both, rates=[0.1, 0.2], cap=1e6, model="hyperbola", resamples=60)
    assert fit.critical_batch == pytest.approx(without.critical_batch, rel=0.05)
    assert fit.high / fit.low < 1.3 * without.high / without.low


def test_two_batch_sizes_in_a_row_that_do_not_reach_are_named():
    steps = runs(np.random.default_rng(1))
    steps[3:5, :2] = INF
    fit = fit_steps(BATCHES, steps, cap=1e5, resamples=60)
    assert (fit.model, fit.critical_batch, fit.low, fit.high) == (None,) * 4
    [text] = [note.text for note in fit.notes if note.figure == "critical_batch"]
    assert "steps fall up to batch 2,048, but most runs at batch 64, 128 do not reach the target" in text


@pytest.mark.parametrize("model", ["hyperbola", "power-law"])
def test_no_bend_is_told_as_far_as_the_interval_shows_none(model):
    """Four of nine batch sizes late, two in a row: the best curve has no bend, and curves nearly as good have."""
    steps = runs(np.random.default_rng(2), curve=1e6 * BATCHES**-1.1)
    for factor, above in ((1.0, True), (4.0, False)):
        fit = fit_steps(BATCHES, steps * np.where(np.arange(9) % 4 < 2, 1, factor)[:, None], model=model, resamples=100)
        [text] = [note.text for note in fit.notes if note.figure == "critical_batch"]
        assert (fit.low == 2048) == above
        assert ("largest tested" in text) == above
        assert ("no bend stands out of the scatter" in text) != above


def test_a_stuck_run_of_one_seed_does_not_bend_the_curve():
    steps = runs(np.random.default_rng(1), 1)[:, 0]
    without = fit_steps(BATCHES, steps, model="hyperbola", resamples=20).critical_batch
    steps[3] = INF
    fit = fit_steps(BATCHES, steps, cap=1e7, model="hyperbola", resamples=20)
    assert fit.critical_batch == pytest.approx(without, rel=0.1)


def test_a_run_that_nobody_made_counts_for_nothing():
    full = runs(np.random.default_rng(2), 12)
    ragged = full.copy()
    ragged[::2, 3:] = NAN
    fit = fit_steps(BATCHES, ragged)
    assert (fit.batches, fit.seeds, fit.model) == (9, 12, "hyperbola")
    assert fit.low < 100 < fit.high
    assert not any("diverged" in note.text or "not reach" in note.text for note in fit.notes)
    wider = np.concatenate([full, np.full((9, 5), NAN)], axis=1)
    assert fit_steps(BATCHES, wider) == fit_steps(BATCHES, full)
    assert dict(fit.measured_regimes)[8] == "linear"


def test_each_rate_is_judged_on_its_own_runs():
    steps = np.array([[[50, 52, 54, 56.0]], [[40, NAN, NAN, NAN]], [[NAN] * 4], [[-INF, 30, INF, NAN]]])
    index, median = best_rate(steps)
    assert (index.tolist(), median.tolist()) == ([1], [40])
    assert best_rate(steps[2:])[1].tolist() == [INF]  # one of three reaches
    assert best_rate(np.array([[[-INF, 30, NAN, NAN]]]))[1].tolist() == [30]  # one of two does


def test_seeds_are_drawn_whole_of_those_that_a_batch_size_has():
    made = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]], dtype=bool)
    index = _drawn(made, 4000, np.random.default_rng(0))
    assert (index[:, 0] == index[:, 1]).all()  # the same seeds: the same draws
    for j, own in enumerate(made):
        taken = index[:, j, : own.sum()]
        shares = np.bincount(taken.ravel(), minlength=6) / taken.size
        assert shares == pytest.approx(own / own.sum(), abs=0.02)
        assert (index[:, j, own.sum() :] == -1).all()
    counts = [np.stack([(index[:, j] == k).sum(-1) for k in (2, 3)]) for j in (0, 2)]
    assert np.corrcoef(counts[0][0], counts[1][0])[0, 1] > 0.3  # of shared seeds, often the same


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_power_law_is_not_called_inverse(exponent, noise):
    batches = np.array([32, 64, 128, 256, 512, 1024])
    rng = np.random.default_rng(3)
    steps = 1e5 * (batches[:, None] / 32) ** -exponent * np.exp(noise * rng.standard_normal((6, 3)))
    fit = fit_steps(batches, steps, resamples=60)
    truth = 32 * 2 ** (1 / (1 - exponent))  # twice the examples of the smallest batch
    assert (fit.model, fit.s_min) == ("power-law", None)
    assert fit.critical_batch == pytest.approx(truth, rel=1e-3 if not noise else 0.15)
    assert (fit.low or 0) <= truth <= (fit.high or INF)
    assert fit.b20_zhang == pytest.approx(fit.b20)
    assert (fit.b_min, fit.b_min_low) == (32, None)
    assert not any("1 / batch throughout" in note.text for note in fit.notes)


def test_the_inverse_is_still_told_where_the_exponent_is_one_within_its_error():
    rng = np.random.default_rng(4)
    steps = 1e5 / BATCHES[:, None] * np.exp(0.05 * rng.standard_normal((9, 3)))
    fit = fit_steps(BATCHES, steps, resamples=60)
    assert fit.model == "inverse"
    assert (fit.critical_batch, fit.b_min) == (None, None)
    assert any("steps fall as 1 / batch throughout" in note.text for note in fit.notes)


def test_where_small_batches_cost_more_examples_nothing_is_linear_there():
    """32 to 64 saves two thirds of the steps, as published for large language models' learning-rate sweeps."""
    batches = 2.0 ** np.arange(4, 13)
    curve = 200 * (1 + (300 / batches) ** 1.6)
    rng = np.random.default_rng(5)
    fit = fit_steps(batches, np.round(curve[:, None] * np.exp(0.03 * rng.standard_normal((9, 3)))), resamples=100)
    fewest = 300 * 0.6 ** (1 / 1.6)  # dE/dB = 0
    assert fit.b_min == pytest.approx(fewest, rel=0.1)
    assert fit.b_min_low <= fewest <= fit.b_min_high
    assert fit.b20 > fit.b_min
    labels = dict(fit.regimes)
    assert {labels[16], labels[32], labels[64]} == {"superlinear"}
    assert dict(fit.measured_regimes)[16] == "superlinear"


def test_the_definition_of_zhang_stands_beside_b20():
    fit = fit_steps(BATCHES, CURVE, model="hyperbola")
    assert fit.b20 == pytest.approx(20, rel=1e-3)
    assert fit.b20_zhang == pytest.approx(0.2 * 100 + 1.2 * 8, rel=1e-3)
    assert fit.b20_zhang_low <= fit.b20_zhang <= fit.b20_zhang_high


@pytest.mark.parametrize("model", ["hyperbola", "power", "smooth", "u-turn", "power-law", "flat"])
def test_zhangs_batch_takes_a_fifth_more_examples_than_the_smallest(model):
    from pybatch.fits import steps_model

    p = np.log([[50.0, 90.0, 1.4], [70.0, 300.0, 0.8], [60.0, 20.0, 5000.0]])[:, : len(steps_model.NAMES[model])]
    if model == "power-law":
        p[:, 1] = np.log([0.3, 0.5, 0.8])
    if model == "u-turn":
        p[:, 2] = np.log([900.0, 5000.0, 300.0])
    if model in ("power", "smooth"):
        p[2, 2] = np.log(2.5)
    found = steps_model.figures(model, p, 8.0, 2048.0)
    for k, batch in enumerate(found[:, 4]):
        own, there = (b * np.exp(steps_model.log_steps(model, p, np.array([b]))[0][k, 0]) for b in (8.0, batch))
        assert there == pytest.approx(1.2 * own, rel=1e-6)
        assert batch > 8


def test_misfit_is_told_with_both_figures_and_widens_the_interval():
    rng = np.random.default_rng(6)
    steps = runs(rng, 5, 0.03)
    plain = fit_steps(BATCHES, steps, model="hyperbola", resamples=100)
    bumpy = fit_steps(
        BATCHES, steps * np.exp(0.15 * np.array([1, -1] * 4 + [1]))[:, None], model="hyperbola", resamples=100
    )
    assert not any("no model here follows" in note.text for note in plain.notes)
    [text] = [note.text for note in bumpy.notes if "no model here follows" in note.text]
    assert "batch sizes lie 1" in text
    assert "explains 1" in text
    assert math.log(bumpy.high / bumpy.low) > 2 * math.log(plain.high / plain.low)


@pytest.mark.parametrize(("every", "says"), [(25, True), (1, False), (2, False)])
def test_steps_on_a_grid_ask_for_the_evaluations_before(every, says):
    steps = np.ceil(runs(np.random.default_rng(7)) / every) * every
    fit = fit_steps(BATCHES, steps, model="hyperbola", resamples=20)
    assert any(f"multiples of {every}" in n.text and "before=" in n.text for n in fit.notes) == says
    assert not any("before=" in n.text for n in fit_steps(BATCHES, steps, before=steps - every, resamples=20).notes)


@pytest.mark.parametrize(("scatter", "says"), [(0.005, True), (0.15, False)])
def test_a_finer_grid_is_told_where_seeds_scatter_by_less(scatter, says):
    """25 steps are 2.2 % of the fewest: the interval of seeds that scatter by 0.5 % is that of the grid."""
    rng = np.random.default_rng(7)
    sizes = 2.0 ** np.arange(3, 10)
    exact = 1100 * (1 + 60 / sizes)[:, None] * np.exp(scatter * rng.standard_normal((7, 3)))
    fit = fit_steps(sizes, np.ceil(exact / 25) * 25, model="hyperbola", resamples=20)
    assert any("multiples of 25" in n.text for n in fit.notes) == says


def long_form(table, rates=None):
    batches, seeds, steps = [], [], []
    for j, row in enumerate(table):
        for k, value in enumerate(row):
            if not math.isnan(value):
                batches.append(BATCHES[j])
                seeds.append(f"s{k}")
                steps.append(value)
    order = np.random.default_rng(0).permutation(len(steps))
    return ([values[i] for i in order] for values in (batches, steps, seeds))


def test_one_entry_a_run_is_the_same_as_a_table():
    table = runs(np.random.default_rng(8), 4)
    table[3, 2:] = NAN
    table[5, 0], table[6, 1] = INF, -INF
    batches, steps, seeds = long_form(table)
    fit = fit_steps(batches, steps, seeds=seeds, cap=5000)
    wide = fit_steps(BATCHES, table, cap=5000)
    assert fit.critical_batch == pytest.approx(wide.critical_batch, rel=1e-6)
    assert (fit.batches, fit.seeds) == (wide.batches, wide.seeds)


def test_each_run_may_have_a_rate_and_a_cap_of_its_own():
    batches = [b for b in BATCHES for _ in range(4)]
    rates = [0.1, 0.1, 0.4, 0.4] * 9
    steps = [s * f for s in CURVE for f in (1.0, 1.02, 2.0, 2.1)]
    caps = [2 * s for s in steps]
    steps[3] = INF
    fit = fit_steps(batches, steps, seeds=[0, 1] * 18, rates=rates, cap=caps, model="hyperbola", resamples=20)
    assert fit.critical_batch == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": [0, 1, 0]}, "batches has shape .4,. for 3 seeds"),
        ({"seeds": [0, 0, 1, 1]}, "batch 8 has two runs of seed 0"),
        ({"seeds": [0, 1, 0, 1], "rates": [1, 1, 1, -1]}, "rate -1 is not a learning rate"),
        ({"seeds": [0, 1, 0, 1], "cap": [99, 9, 9, 9]}, "steps 80 at batch 8 are above the cap of 9"),
        ({"seeds": [0, 1, 0, 1], "before": [1, 90, 1, 1]}, "before 90 at batch 8"),
    ],
)
def test_entries_that_cannot_be_runs_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        fit_steps([8, 8, 16, 16], [90, 80, 50, 45], **options)


HEAD = "batch,seed,steps,rate,cap\n"
TRUTH = 100 * (1 + 100 / BATCHES)
RATES = ((0.01, 1.5), (0.1, 1.0))  # and how many times the steps of the best one each takes


def test_a_file_of_runs(tmp_path):
    table = runs(np.random.default_rng(9))
    lines = [f"{b:g};{k};{v:g};4000" for b, row in zip(BATCHES, table, strict=True) for k, v in enumerate(row)]
    lines[4] = "16;1;not reached;4000"
    lines[7] = "32;1;diverged;"
    path = tmp_path / "runs.csv"
    path.write_text("\ufeffBatch_size;Seed;Steps;Cap\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    table[1, 1], table[2, 1] = INF, -INF
    assert fit_steps_csv(path) == fit_steps(BATCHES, table, cap=4000)


def test_an_unreached_run_whose_cap_nobody_logged_counts_as_in_a_table(tmp_path):
    table = np.round(TRUTH * np.ones(1))
    path = tmp_path / "runs.csv"
    rows = [f"{b:g},{'inf' if k == 3 else f'{v:g}'}" for k, (b, v) in enumerate(zip(BATCHES, table, strict=True))]
    path.write_text("batch,steps\n" + "\n".join(rows) + "\n")
    table[3] = INF
    assert fit_steps_csv(path) == fit_steps(BATCHES, table)


def test_seeds_that_name_the_runs_count_at_the_rate_they_were_made_at(tmp_path):
    """Two runs at each of two rates, named 0 to 3: a resample draws among the two there are, not among four."""
    rng = np.random.default_rng(3)
    path = {}
    table = {rate: far * TRUTH[:, None] * np.exp(0.05 * rng.standard_normal((len(TRUTH), 2))) for rate, far in RATES}
    for kind in ("named", "repeated"):
        rows = [
            f"{b:g},{k + (2 * (rate == 0.1) if kind == 'named' else 0)},{rate},{table[rate][i, k]:.0f}"
            for i, b in enumerate(BATCHES)
            for rate, _ in RATES
            for k in range(2)
        ]
        path[kind] = tmp_path / f"{kind}.csv"
        path[kind].write_text("batch,seed,rate,steps\n" + "\n".join(rows) + "\n")
    assert fit_steps_csv(path["named"]) == fit_steps_csv(path["repeated"])
    points = run_fit(path["named"]).convergence.curves[0].points
    assert [(p.reached, p.runs) for p in points] == [(2, 2)] * len(BATCHES)


def test_columns_of_ones_own_beside_the_steps_are_left_alone(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("batch,steps,run10,run11\n" + "".join(f"{b:g},{100 + 4000 / b:g},x,y\n" for b in BATCHES))
    assert fit_steps_csv(path).critical_batch == pytest.approx(40, rel=0.05)


def test_names_of_columns_may_be_as_people_write_them(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("Batch Size,Steps to Target, Run \n" + "".join(f"{b:g},{100 + 4000 / b:g},a\n" for b in BATCHES))
    assert fit_steps_csv(path).critical_batch == pytest.approx(40, rel=0.05)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (HEAD, "no line after its head"),
        ("batch,seed\n8,1\n", "line 1: no column 'steps' in 'batch, seed'"),
        ("batch,stepz,steps,batch\n8,1,1,1\n", "line 1: two columns for batch"),
        ("batch,steps,raet\n8,100,1\n", "line 1: column 'raet': is it 'rate'"),
        (HEAD + "8,0,100,0.1,900\n\nx,0,100,0.1,900\n", "line 4: batch 'x' is no number"),
        (HEAD + "8,0,-3,0.1,900\n", "line 2: steps '-3' is no number"),
        (HEAD + "8,0,nan,0.1,900\n", "line 2: steps 'nan' say nothing. Write inf"),
        (HEAD + "8,0,-,0.1,900\n", "line 2: steps '-' say nothing. Write inf"),
        (HEAD + "8,0,23.7k,0.1,900\n", "line 2: steps '23.7k' is no number .*. Write 23700, without unit"),
        ("batch;steps\n8;23,748\n", "line 2: steps '23,748' is no number .*. Write 23748, without unit"),
        ("batch;steps\n8;23 748 steps\n", "line 2: steps '23 748 steps' is no number .*. Write 23748, without"),
        (HEAD + "8,0,>60000,0.1,900\n", "line 2: steps '>60000' is no number .*. Write inf .* 60000 in a column 'cap'"),
        (HEAD + "1K,0,100,0.1,900\n", "line 2: batch '1K' is no number .*. Write the number: 1000, or 1024"),
        ("batch,examples\n8,100\n", "no column 'steps' in 'batch, examples'. Give steps = examples / batch"),
        ("batch,epochs\n8,100\n", "no column 'steps' .*. Give steps = epochs"),
        ("batch,seed0,seed1\n8,100,90\n", "line 1: a column for each run. Give one line for each"),
        (HEAD + "8,0,100,0,900\n", "line 2: rate '0' .*. Give the rate"),
        ("batch;steps;rate\n8;10;0,1\n", "line 2: rate '0,1' .*. Write 0.1, with a decimal point"),
        ("batch;steps\n8;12,5\n", "line 2: steps '12,5' .*. Write 12.5, with a decimal point"),
        ("batch;steps\n8;3 4\n", "line 2: steps '3 4' .*. Give the steps"),
        ("batch;steps\n8;0\n", "line 2: steps '0' .*. Give the steps"),
        ("batch;steps\n8;64000 examples\n", "line 2: steps '64000 examples' .*. Give the steps"),
        ("batch;steps\n>8;10\n", "line 2: batch '>8' .*. Give the batch"),
        ("batch;steps\n8;~900\n", "line 2: steps '~900' .*. Write inf"),
        (
            HEAD + "8,0,inf,0.1,\n8,1,inf,0.1,900\n",
            "line 2: a run that did not reach the target has no cap",
        ),
        (HEAD + "8,0,1000,0.1,900\n", "line 2: steps 1000 are above the cap of 900"),
        (HEAD + "8,0,900,0.1,900\n", "line 2: steps 900 are the cap: .* Write inf .* 'reached' in a column 'status'"),
        (HEAD + "8,0,100,0.1,900\n8,0,101,0.1,900\n", "line 3: batch 8, seed '0' and rate 0.1 stand in line 2 already"),
        (HEAD + "8,0,100,0.1\n", "line 2: 4 cells where the head has 5"),
        ("batch,steps,status\n8,100,lost\n", "line 2: status 'lost' is not known. Write reached"),
        ("batch,steps,reached\n8,100,maybe\n", "line 2: reached 'maybe' is not known. Write true or false"),
        ("batch,steps,reached,status\n8,100,true,diverged\n", "line 2: status 'diverged' beside reached 'true'"),
        ("batch,steps,status\n8,inf,reached\n", "line 2: status 'reached' beside steps 'inf'"),
        ("batch,steps,before\n8,100,100\n", "line 2: before '100'"),
        ("batch,seed,steps\n8,,100\n", "line 2: no seed"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_its_value(tmp_path, text, says):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        fit_steps_csv(path)


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("yes", "no"), ("1", "0")])
def test_a_column_says_whether_runs_reached(tmp_path, yes, no):
    """Given up at a cap, they were taken for steps to the target."""
    path, status = tmp_path / "reached.csv", tmp_path / "status.csv"
    lines = [(f"{b},{s:g}", True) for b, s in zip(BATCHES, CURVE, strict=True)]
    lines += [("8,3000", False), ("16,3000", False)]
    for where, head, words in ((path, "reached", (no, yes)), (status, "status", ("not reached", "reached"))):
        where.write_text(f"batch,steps,{head}\n" + "".join(f"{line},{words[met]}\n" for line, met in lines))
    assert fit_steps_csv(path) == fit_steps_csv(status)


def test_a_status_beside_the_steps_says_how_far_a_run_went(tmp_path):
    path = tmp_path / "runs.csv"
    lines = [f"{b:g},{s:g},reached" for b, s in zip(BATCHES, CURVE, strict=True)]
    path.write_text("batch,steps,status\n" + "\n".join([*lines, "8,3000,not reached"]) + "\n")
    known = fit_steps(
        [*BATCHES, 8], [*map(float, (f"{s:g}" for s in CURVE)), INF], seeds=["1"] * 9 + ["2"], cap=[*[NAN] * 9, 3000]
    )
    assert fit_steps_csv(path) == known


def test_the_same_runs_hold_the_truth():
    """Stuck runs, gaps and a knee at once: of 40 intervals, no more than 5 miss (bench/steps_coverage.py has more)."""
    rng, held = np.random.default_rng(10), 0
    for seed in range(20):
        steps = runs(rng, 5)
        steps[rng.random(steps.shape) < 1 / 27] = INF
        steps[np.arange(5) >= rng.integers(2, 6, 9)[:, None]] = NAN
        fit = fit_steps(BATCHES, steps, cap=50_000, model="hyperbola", seed=seed, resamples=60)
        held += ((fit.low or 0) <= 100 <= (fit.high or INF)) + ((fit.b20_low or 0) <= 20 <= (fit.b20_high or INF))
    assert held >= 35


def test_a_run_that_reached_at_its_very_cap_and_other_names_of_columns(tmp_path):
    path = tmp_path / "runs.csv"
    lines = [f"{b:g},{s:g},{2 * s:g},reached" for b, s in zip(BATCHES, CURVE, strict=True)]
    lines[-1] = f"{BATCHES[-1]:g},{CURVE[-1]:g},{CURVE[-1]:g},reached"
    path.write_text("bs,steps_to_target,max_steps,status\n" + "\n".join(lines) + "\n")
    assert read_runs(path).steps[-1] == float(f"{CURVE[-1]:g}")
    told = tmp_path / "before.csv"
    told.write_text("batch,steps,cap,before\n8,900,900,875\n")  # that it reached
    assert read_runs(told).steps == [900.0]
    steps = [float(f"{s:g}") for s in CURVE]
    caps = [*(float(f"{2 * s:g}") for s in CURVE[:-1]), steps[-1]]
    assert fit_steps_csv(path) == fit_steps(BATCHES, steps, seeds=["1"] * len(steps), cap=caps)
