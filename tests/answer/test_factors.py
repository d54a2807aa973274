"""Effects of a workload's dials on the critical batch: planted factorials."""

import dataclasses
import itertools
import math

import pytest

from pybatch.answer.factors import effects
from pybatch.records import Convergence, Curve, Run, WorkloadInfo
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
