"""Effects of a workload's dials on the critical batch: planted factorials."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pybatch.answer.factors import effects
from pybatch.answer.interactions import interactions, rankings
from pybatch.records import Convergence, Curve, Run, WorkloadInfo
from pybatch.report.factors import sections
from pybatch.report.formats.html import page
from pybatch.report.formats.text import render_all

HALF = 0.2  # of every interval, in ln


def sweep(critical, model="mlp", open_end=False, name="digits", rule="tuned", split="train", target=0.1, **options):
    work = WorkloadInfo(name, "images", 100, "fp32", model=model, options=options)
    ends = critical * math.exp(-HALF), None if open_end else critical * math.exp(HALF)
    curve = Curve(rule, split, (), 50.0, critical, *ends, target=target)
    return Run("", None, convergence=Convergence((curve,), optimizer="sgd", workload=work))


def test_one_pair_is_the_ratio_with_both_errors():
    [found] = effects([sweep(40, subset=0.25), sweep(80, subset=1.0)])
    assert (found.dial, found.old, found.new, found.pairs) == ("subset", 0.25, 1.0, 1)
    assert found.ratio == pytest.approx(2)
    assert found.low == pytest.approx(2 * math.exp(-HALF * math.sqrt(2)))
    assert found.high == pytest.approx(2 * math.exp(HALF * math.sqrt(2)))
    assert found.determined


def test_levels_are_in_order_whichever_sweep_comes_first():
    assert effects([sweep(80, subset=1.0), sweep(40, subset=0.25)]) == effects(
        [sweep(40, subset=0.25), sweep(80, subset=1.0)]
    )


def test_a_factorial_gives_main_effects_with_the_error_of_their_mean():
    planted = {"subset": 1.1, "model": 3.0, "label_noise": 1.0}
    runs = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        critical = 50 * planted["subset"] ** a * planted["model"] ** b * planted["label_noise"] ** c
        runs.append(sweep(critical, model=("cnn", "mlp")[b], subset=(0.5, 1.0)[a], label_noise=(0.0, 0.1)[c]))
    found = {e.dial: e for e in effects(runs)}
    assert found.keys() == planted.keys()
    for dial, effect in found.items():
        assert effect.pairs == 4
        assert effect.ratio == pytest.approx(planted[dial])
        assert math.log(effect.high / effect.ratio) == pytest.approx(HALF * math.sqrt(8) / 4)
    assert found["model"].determined
    assert not found["label_noise"].determined


@pytest.mark.parametrize("changes", [{"dtype": "bf16"}, {"file_sha256": "0f" * 32}])
def test_sweeps_in_another_precision_or_of_another_file_make_no_pair(changes):
    other = sweep(80, subset=1.0)
    steps = other.convergence
    there = dataclasses.replace(steps, workload=dataclasses.replace(steps.workload, **changes))
    assert effects([sweep(40, subset=0.25), dataclasses.replace(other, convergence=there)]) == ()


def test_sweeps_that_differ_in_two_dials_tell_nothing_of_either():
    assert effects([sweep(40, subset=0.5, width=1), sweep(80, subset=1.0, width=2)]) == ()


@pytest.mark.parametrize(
    "other",
    [
        {"name": "scenes"},
        {"split": "test"},
        {"target": 0.2},
        {"rule": "sqrt"},
        {"width": 1},  # a dial the first one has not
    ],
)
def test_what_is_not_alike_is_not_compared(other):
    assert effects([sweep(40, subset=0.5), sweep(80, subset=1.0, **other)]) == ()


def test_an_open_interval_stays_open():
    [found] = effects([sweep(40, subset=0.5), sweep(80, subset=1.0, open_end=True)])
    assert found.high is None
    assert found.low is not None


def test_the_later_of_two_sweeps_of_the_same_dials_counts():
    [found] = effects([sweep(40, subset=0.5), sweep(60, subset=1.0), sweep(80, subset=1.0)])
    assert found.ratio == pytest.approx(2)
    assert found.pairs == 1


def test_runs_without_a_sweep_are_passed_over():
    bare = dataclasses.replace(sweep(40, subset=0.5), convergence=None)
    assert effects([bare, sweep(80, subset=1.0)]) == ()


def test_the_report_of_several_sweeps_says_what_moves_the_critical_batch():
    runs = [sweep(40, subset=0.25), sweep(80, subset=1.0)]
    for text in (render_all(runs, "table"), render_all(runs, "md"), page(runs)):
        assert text.count("What moves the critical batch") == 1
        assert "subset 0.250 to 1" in text
        assert "2 " in text
    assert "What moves" not in render_all(runs[:1], "md")
    assert "What moves" not in render_all(runs, "csv")


def square(a, b, both, **more):
    """Four sweeps: the critical batch at both low levels is 50, and so many times it where one or both are high."""
    planted = {(0, 0): 1.0, (1, 0): a, (0, 1): b, (1, 1): both}
    return [sweep(50 * by, model=("cnn", "mlp")[i], subset=(0.5, 1.0)[j], **more) for (i, j), by in planted.items()]


def test_an_interaction_is_a_ratio_of_ratios_with_all_four_errors():
    [found] = interactions(square(3.0, 1.5, 9.0))
    assert (found.dials, found.old, found.new, found.squares) == (("model", "subset"), ("cnn", 0.5), ("mlp", 1.0), 1)
    assert found.ratio == pytest.approx(9 / (3 * 1.5))
    assert math.log(found.high / found.ratio) == pytest.approx(HALF * math.sqrt(4))
    assert found.determined
    [none] = interactions(square(3.0, 1.5, 4.5)[::-1])  # whatever their order
    assert none.ratio == pytest.approx(1)
    assert not none.determined


def test_squares_of_a_third_dial_are_averaged_and_three_sweeps_make_none():
    runs = [*square(3.0, 1.5, 9.0, width=1), *square(3.0, 1.5, 9.0, width=2)]
    found = {i.dials: i for i in interactions(runs)}
    assert found["model", "subset"].squares == 2
    assert math.log(found["model", "subset"].high / 2) == pytest.approx(HALF * math.sqrt(8) / 2)
    assert found["model", "width"].ratio == pytest.approx(1)
    assert interactions(square(3.0, 1.5, 9.0)[:3]) == ()


def test_dials_rank_only_where_their_intervals_lie_apart():
    [order] = rankings(square(6.0, 1.1, 6.6))
    assert [(d.dial, d.kind) for d in order.dials] == [("model", "architecture"), ("subset", "data size")]
    assert order.above == (("model", "subset"),)
    assert order.determined
    assert order.dials[0].size == pytest.approx(6)
    assert order.dials[1].low == 1.0  # it may be none
    [close] = rankings(square(1.3, 1.25, 1.3 * 1.25))
    assert close.above == ()
    assert not close.determined


def test_a_dial_that_lowers_the_critical_batch_moves_it_as_much_as_one_that_raises_it():
    [order] = rankings(square(1 / 6, 1.1, 1.1 / 6))
    assert order.dials[0].dial == "model"
    assert order.dials[0].size == pytest.approx(6)
    assert order.above == (("model", "subset"),)


def test_an_open_interval_outranks_nothing_it_may_fall_short_of():
    runs = [
        sweep(c, model=m, subset=s, open_end=True)
        for c, m, s in ((50, "cnn", 0.5), (400, "mlp", 0.5), (60, "cnn", 1.0))
    ]
    [order] = rankings(runs)
    assert order.above == ()
    assert math.isinf(order.dials[0].high)


def test_without_effects_one_factorial_in_twenty_finds_something():
    """Estimates drawn about one critical batch with the error that they tell."""
    rng, wrong = np.random.default_rng(0), {"effect": 0, "interaction": 0, "order": 0}
    for _ in range(200):
        runs = square(*np.exp(HALF / 1.96 * rng.standard_normal(3)))
        base = runs[0].convergence.curves[0]
        moved = np.exp(HALF / 1.96 * rng.standard_normal())
        drawn = dataclasses.replace(
            base, critical_batch=50 * moved, low=50 * moved * math.exp(-HALF), high=50 * moved * math.exp(HALF)
        )
        runs[0] = dataclasses.replace(runs[0], convergence=dataclasses.replace(runs[0].convergence, curves=(drawn,)))
        wrong["effect"] += next(e for e in effects(runs) if e.dial == "model").determined
        wrong["interaction"] += interactions(runs)[0].determined
        wrong["order"] += bool(rankings(runs)[0].above)
    assert max(wrong.values()) <= 18  # of 200 at 5 %, the 99th percentile


def test_the_report_says_what_depends_on_what_in_which_order_and_what_was_left_out():
    bare = sweep(50, model="cnn", subset=0.1)
    curve = dataclasses.replace(bare.convergence.curves[0], critical_batch=None)
    bare = dataclasses.replace(bare, convergence=dataclasses.replace(bare.convergence, curves=(curve,)))
    text = render_all([*square(6.0, 1.1, 20.0), bare], "md")
    assert "**model × subset**: model cnn to mlp has 3.03" in text
    assert "**in order**: model (architecture) 10.4" in text
    assert "data size" in text
    [section] = sections([*square(6.0, 1.1, 20.0), bare])
    assert section.details[-1] == "1 sweep has no critical batch, or a bound of it alone, and is left out"
