"""Two runs against each other: planted changes are found, noise alone is not, and conditions hold or break."""

import dataclasses
import json

import numpy as np
import pytest

from pybatch.answer.changes import Condition, broken, compare, parse_condition
from pybatch.base.errors import UsageError
from pybatch.records import Convergence, ConvergencePoint, Curve, Run, Training
from pybatch.report.changes import sections
from pybatch.report.formats.text import markdown


def scaled(run, factor, error=0.01, rng=None):
    """The run with step times multiplied, each within its stated error where `rng` is given."""
    points = []
    for point in run.capacity.batches:
        if point.step_ms is None:
            points.append(point)
            continue
        t = point.step_ms * factor * (np.exp(rng.normal(0, error / 1.96)) if rng else 1.0)
        points.append(dataclasses.replace(point, step_ms=t, step_ms_low=t * (1 - error), step_ms_high=t * (1 + error)))
    capacity = dataclasses.replace(run.capacity, batches=tuple(points))
    return dataclasses.replace(run, capacity=capacity)


def change_of(comparison, figure):
    return next(change for change in comparison.changes if change.figure == figure)


def test_a_run_has_not_changed_against_itself(run):
    comparison = compare(run, run)
    assert comparison.differences == ()
    for change in comparison.changes:
        assert change.ratio == pytest.approx(1.0)
        assert not change.significant


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_planted_change_is_found(run, factor):
    throughput = change_of(compare(run, scaled(run, factor)), "throughput")
    assert throughput.ratio == pytest.approx(1 / factor)
    assert throughput.significant
    assert throughput.low < 1 / factor < throughput.high


def test_the_interval_holds_no_change_in_most_repeats(run):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        throughput = change_of(compare(scaled(run, 1, rng=rng), scaled(run, 1, rng=rng)), "throughput")
        held += throughput.low <= 1.0 <= throughput.high
    assert 0.92 <= held / 300 <= 1.0


def test_the_ratio_of_two_intervals_is_wider_than_either(run):
    noise = change_of(compare(run, run), "noise_scale")
    assert noise.low < run.noise.low / run.noise.b_simple
    assert noise.high > run.noise.high / run.noise.b_simple


def test_figures_missing_in_one_run_are_left_out(run):
    other = dataclasses.replace(run, noise=None)
    names = {change.figure for change in compare(run, other).changes}
    assert "noise_scale" not in names
    assert "throughput" in names
    with pytest.raises(UsageError, match="no figure in common"):
        compare(dataclasses.replace(run, capacity=None, verdict=None), other)


def test_memory_is_compared_at_common_batches_only(run):
    first = run.capacity.batches[0]
    small = dataclasses.replace(run.capacity, batches=(dataclasses.replace(first, memory_bytes=6 * 2**20),))
    memory = change_of(compare(run, dataclasses.replace(run, capacity=small)), "memory")
    assert memory.ratio == pytest.approx(2.0)
    assert memory.batches == 1


def test_what_differs_is_said(run):
    device = dataclasses.replace(run.capacity.device, name="Other CPU")
    other = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, device=device))
    assert compare(run, other).differences == ("device: Example CPU against Other CPU",)


@pytest.mark.parametrize(
    ("text", "condition"),
    [("throughput:-3%", Condition("throughput", -0.03)), (" memory : +10.5 % ", Condition("memory", 0.105))],
)
def test_conditions_are_read(text, condition):
    assert parse_condition(text) == condition


@pytest.mark.parametrize("text", ["throughput", "throughput:3%", "throughput:-3", "speed:-3%", "throughput:-0%", ""])
def test_bad_conditions_say_what_is_allowed(text):
    with pytest.raises(UsageError, match="fail-on"):
        parse_condition(text)


def test_conditions_break_only_past_limit_and_error(run):
    slower, faster = scaled(run, 1.1), scaled(run, 0.9)
    assert broken([parse_condition("throughput:-3%")], compare(run, slower))
    assert not broken([parse_condition("throughput:-15%")], compare(run, slower))
    assert not broken([parse_condition("throughput:-3%")], compare(run, faster))
    assert broken([parse_condition("throughput:+3%")], compare(run, faster))
    noisy = scaled(run, 1.1, error=0.4)
    assert not broken([parse_condition("throughput:-3%")], compare(scaled(run, 1, error=0.4), noisy))


def test_a_condition_that_cannot_be_checked_is_not_taken_as_kept(run):
    said = broken([parse_condition("energy:+5%")], compare(run, run))
    assert said == ["energy is not in both runs, so +5 % can't be checked"]


def test_a_condition_on_two_workloads_is_not_taken_as_kept(run):
    """A gate in CI passed while it compared digits with text."""
    work = dataclasses.replace(run.capacity.workload, name="other", model=None)
    other = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, workload=work))
    comparison = compare(run, other)
    assert f"model: {run.capacity.workload.model} against not given" in comparison.differences
    [said] = broken([parse_condition("throughput:-3%"), parse_condition("memory:+9%")], comparison)
    assert "not of one workload (workload name: " in said
    assert not broken([], comparison)
    noise = {"capacity": None, "convergence": None, "verdict": None}
    one, two = (dataclasses.replace(run, **noise, training=Training(name, "Net", "SGD", ())) for name in ("a", "b"))
    assert "workload name: a against b" in compare(one, two).differences
    assert broken([parse_condition("noise_scale:+10%")], compare(one, two))


def test_markdown_says_better_and_worse(run):
    text = markdown("x", sections(compare(run, scaled(run, 0.5))))
    assert "better" in text
    assert "worse" in markdown("x", sections(compare(run, scaled(run, 2.0))))
    assert json.dumps(dataclasses.asdict(compare(run, run)))  # plain types all through


def test_how_steps_were_run_is_told(run):
    graph = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, mode="graph"))
    assert compare(run, graph).differences == ("steps: eager against graph",)


def test_two_sweeps_have_their_critical_batches_compared(run):
    def swept(critical, name):
        curve = Curve("tuned", "train", (), 100.0, critical, critical / 1.2, critical * 1.2, target=0.1)
        where = dataclasses.replace(run.capacity.workload, name=name)
        return Run(run.created, None, convergence=Convergence((curve,), workload=where, device=run.capacity.device))

    found = compare(swept(100.0, "digits"), swept(200.0, "text"))
    change = change_of(found, "critical_batch")
    assert (change.old, change.new, change.significant) == (100.0, 200.0, True)
    assert found.differences == ("workload name: digits against text",)
    other = compare(dataclasses.replace(run, capacity=None), swept(100.0, "digits"))
    assert "critical batch from: noise against sweep" in other.differences


def test_sweeps_with_bounds_alone_share_their_steps_and_tell_the_bounds(run):
    def swept(steps, low, target=0.1):
        points = tuple(ConvergencePoint(b, s, "reached", 3, 0.1, reached=3) for b, s in steps.items())
        curve = Curve("tuned", "train", points, None, None, low, None, target=target)
        return Run(run.created, None, convergence=Convergence((curve,)))

    old = swept({8: 100.0, 16: 50.0, 32: 25.0}, 32.0)
    found = compare(old, swept({8: 200.0, 16: 100.0}, 16.0))
    change = change_of(found, "steps")
    assert (change.ratio, change.batches, change.low) == (pytest.approx(2.0), 2, None)
    assert found.differences == ("critical batch: at least 32 against at least 16",)
    with pytest.raises(UsageError, match="no figure in common"):  # steps to another target are another thing
        compare(old, swept({8: 200.0}, 8.0, target=0.2))


def test_sweeps_with_different_optimizers_say_so(run):
    sgd, adam = (dataclasses.replace(run, convergence=Convergence((), optimizer=name)) for name in ("sgd", "adam"))
    assert "optimizer: sgd against adam" in compare(sgd, adam).differences
    assert not any("optimizer" in text for text in compare(sgd, sgd).differences)


def test_rules_that_start_elsewhere_say_so(run):
    def swept(rule, **base):
        point = ConvergencePoint(8, 100.0, "reached", 3, 0.1, reached=3)
        curves = (Curve(rule, "train", (point,), None, None, None, None, 0.1),)
        return dataclasses.replace(run, convergence=Convergence(curves, **base))

    given = compare(swept("linear", base_batch=8), swept("linear", base_batch=16, base_rate=0.05))
    assert given.differences == ("base batch: 8 against 16", "base rate: tuned against 0.05")
    tuned = compare(swept("tuned", base_batch=8), swept("tuned", base_batch=16))
    assert tuned.differences == ()


@pytest.mark.parametrize(
    ("figure", "section", "high"),
    [
        ("ceiling", "model", "ceiling_high"),
        ("half_batch", "model", "half_high"),
        ("saturation_batch", "capacity", "saturation_high"),
        ("noise_scale", "noise", "high"),
        ("best_batch", "verdict", "best_high"),
    ],
)
def test_a_wider_upper_end_of_the_new_run_widens_the_ratio_upwards_alone(run, figure, section, high):
    part = run.capacity.model if section == "model" else getattr(run, section)
    wide = dataclasses.replace(part, **{high: 3 * getattr(part, high)})
    if section == "model":
        section, wide = "capacity", dataclasses.replace(run.capacity, model=wide)
    before, after = (change_of(compare(run, new), figure) for new in (run, dataclasses.replace(run, **{section: wide})))
    assert after.ratio == before.ratio == pytest.approx(1.0)
    assert after.low == pytest.approx(before.low)
    assert after.high > 2.9 * before.ratio
