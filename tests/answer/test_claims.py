"""The seed paper's claims on planted sweeps: each finding, and what must not be concluded."""

import dataclasses
import math

import numpy as np
import pytest
from cases.points import claims, curve
from cases.verdicts import capacity

from pybatch.answer.claims import check_claims, notes_on_claims
from pybatch.answer.rules import breaks
from pybatch.records import Convergence, ConvergencePoint, RateSteps, Run, WorkloadInfo
from pybatch.report import factors
from pybatch.report.claims import sections
from pybatch.scaling import Scaled
from pybatch.sweep.summary import point as summarized
from pybatch.training.trajectory import Trajectory, loss_at
from pybatch.training.trial import Outcome, Study, Trial

RATE = 0.5


def point(batch, steps, losses=(), reached=None):
    """A point of seeds with these steps; None: not reached."""
    known = sorted(s for s in steps if s is not None)
    status = "reached" if 2 * len(known) >= len(steps) else "not_reached"
    rows = (RateSteps(RATE, tuple(steps), tuple("reached" if s else "not_reached" for s in steps)),)
    middle = known[len(known) // 2] if status == "reached" else None
    count = len(known) if reached is None else reached
    return ConvergencePoint(
        batch, middle, status, len(steps), RATE, reached=count, rates=rows, other_losses=tuple(losses)
    )


def steps_at(batch, noise=(0.98, 1.0, 1.03)):
    """S = 100 (1 + 50 / B) with a seed's own factor."""
    return [100 * (1 + 50 / batch) * f for f in noise]


BATCHES = (8, 16, 32, 64, 128, 256, 512)
TUNED = tuple(point(b, steps_at(b)) for b in BATCHES)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, "yes"),
        ({"b_stag_high": 700.0}, "undetermined"),
        ({"b_stag_high": None}, "undetermined"),
        ({"b_stag": 900.0, "b_stag_low": 600.0, "b_stag_high": 1500.0}, "no"),
        ({"b_stag": 900.0, "b_stag_low": 400.0, "b_stag_high": 1500.0}, "undetermined"),
        ({"model": None}, "not measured"),
    ],
)
def test_steps_level_off_only_where_the_whole_interval_was_tested(changes, finding):
    assert claims(curve("tuned", TUNED, **changes))["train steps level off"].finding == finding


@pytest.mark.parametrize(
    ("critical", "low", "high", "stagnant", "finding"),
    [
        (None, 512.0, None, (512.0, None), "no"),  # falls to the end
        (None, 512.0, None, (300.0, None), "undetermined"),  # as far as is known, it may level off before
        (None, None, 8.0, (150.0, 260.0), "yes"),  # never falls
        (50.0, 40.0, 60.0, (150.0, 260.0), "undetermined"),  # a fit that has no such batch
        (50.0, 40.0, 60.0, (600.0, None), "no"),  # a power law
        (None, None, None, (150.0, 260.0), "undetermined"),
    ],
)
def test_a_fit_without_a_stagnant_batch_is_read_by_its_bounds(critical, low, high, stagnant, finding):
    fitted = curve("tuned", TUNED, b_stag=None, b_stag_low=stagnant[0], b_stag_high=stagnant[1])
    bare = dataclasses.replace(fitted, critical_batch=critical, low=low, high=high)
    assert claims(bare)["train steps level off"].finding == finding


@pytest.mark.parametrize(
    ("high", "finding", "text"),
    [
        (8.0, "yes", "hardly fall at all"),
        (100.0, "yes", "from at most 100 on"),
        (900.0, "undetermined", "no bend stands out"),  # past the largest batch size
        (None, "undetermined", "no bend stands out"),
    ],
)
def test_flat_steps_level_off_where_their_bound_was_tested(high, finding, text):
    flat = curve("tuned", TUNED, model="flat", b_stag=None, b_stag_high=high)
    found = claims(dataclasses.replace(flat, critical_batch=None, low=None, high=8.0))["train steps level off"]
    assert found.finding == finding
    assert text in found.text


def test_what_a_doubling_costs_is_the_slope_of_the_examples_over_all_batch_sizes():
    found = claims(curve("tuned", TUNED))["train cost rises"]
    assert found.finding == "yes"
    examples = [math.log(b * 100 * (1 + 50 / b)) for b in BATCHES]  # seeds share their factors: the slope is exact
    want = math.exp(np.polyfit(np.log2(BATCHES), examples, 1)[0])
    assert found.value == pytest.approx(want)
    assert f"each doubling from 8 to 512 takes {want:.3g} [" in found.text


def test_a_rise_past_the_cheapest_batch_is_not_hidden_by_the_fall_before_it():
    """Small batches cost more: the ends take the same, and the trend over all is level."""
    turn = [point(b, [1e5 / b * 2 ** abs(math.log2(b / 64)) * f for f in (0.97, 1.0, 1.04)]) for b in BATCHES]
    found = claims(curve("tuned", turn))["train cost rises"]
    assert found.finding == "yes"
    assert "each doubling from 64 to 512 takes 2 [" in found.text


def test_the_batch_that_costs_are_counted_from_is_chosen_by_the_other_seeds():
    costs = {8: (4e4, 1e4), 16: (1e4, 4e4), 32: (3e4, 3e4)}  # the first seed is cheapest at 16, the second at 8
    found = claims(curve("tuned", [point(b, [c / b for c in own]) for b, own in costs.items()]))["train cost rises"]
    first = np.polyfit([3, 4, 5], np.log([4e4, 1e4, 3e4]), 1)[0]  # from 8, by the second
    assert found.value == pytest.approx(math.exp((first + math.log(3 / 4)) / 2))


def test_no_cost_falls_by_leaving_out_the_seeds_that_did_not_reach():
    def falling(last):
        return claims(curve("tuned", [point(8, [100.0] * 4), point(16, [45.0] * 4), point(32, last)]))

    assert falling([20.0] * 4)["train cost rises"].finding == "no"
    lost = falling([20.0, None, 20.0, 20.0])["train cost rises"]
    assert lost.finding == "undetermined"
    assert "(3 of 4 seeds)" in lost.text
    assert "reached by 3 of 4 at 32" in lost.text


def test_steps_are_whole_so_seeds_that_agree_are_not_exact():
    coarse = (point(8, [36.0] * 3), point(16, [19.0] * 3))
    assert claims(curve("tuned", coarse))["train cost rises"].finding == "undetermined"


def test_costs_within_the_spread_of_the_seeds_are_undetermined():
    close = (point(8, [100, 140, 80]), point(16, [60, 55, 65]))
    assert claims(curve("tuned", close))["train cost rises"].finding == "undetermined"


def test_one_seed_determines_no_cost():
    alone = tuple(point(b, steps_at(b, (1.0,))) for b in BATCHES)
    assert claims(curve("tuned", alone))["train cost rises"].finding == "undetermined"


def test_where_the_largest_batch_is_the_cheapest_cost_does_not_rise():
    perfect = tuple(point(b, [8000 / b] * 3) for b in (8, 16, 32))
    falling = (*perfect, point(64, [100, 100, 100]))
    assert claims(curve("tuned", falling))["train cost rises"].finding == "no"


@pytest.mark.parametrize(("count", "seeds"), [(8, 3), (2, 1)])
def test_equal_costs_are_told_apart_in_no_more_than_one_of_twenty_sweeps(count, seeds):
    """Perfect scaling with 10 % noise: choosing the cheapest batch to compare with found a difference in 22 %."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        points = [point(b, list(8e4 / b * np.exp(0.1 * rng.standard_normal(seeds)))) for b in 8 * 2 ** np.arange(count)]
        wrong += claims(curve("tuned", points))["train cost rises"].finding != "undetermined"
    assert wrong <= 25  # of 300 at 5 %, the 99th percentile is 24 or 25


@pytest.mark.parametrize(
    ("low", "high", "most", "finding"),
    [
        (40.0, 60.0, 100_000, "yes"),  # the planted device saturates in the hundreds
        (40.0, 60.0, 20, "no"),  # memory ends before
        (10.0, 1e6, 100_000, "undetermined"),
        (40.0, None, 100_000, "undetermined"),  # an open end may lie anywhere
    ],
)
def test_the_critical_batch_against_the_smaller_of_saturation_and_memory(low, high, most, finding):
    found = claims(curve("tuned", TUNED, low=low, high=high), measured=capacity(max_batch=most))
    assert found["train below capacity"].finding == finding


def test_without_a_capacity_nothing_is_said_of_it():
    assert claims(curve("tuned", TUNED))["train below capacity"].finding == "not measured"


def test_a_rule_fails_at_the_first_batch_its_seeds_do_not_reach():
    linear = (point(8, steps_at(8)), point(16, steps_at(16)), point(32, steps_at(32)), point(64, [None] * 3))
    found = claims(curve("tuned", TUNED), curve("linear", linear))["train, linear fails"]
    assert found.finding == "yes"
    assert "holds to 32 (as many steps as tuned [" in found.text
    assert "fails at 64: 0 of 3 reach, 3 of 3 with tuned rates" in found.text


def test_a_rule_fails_where_it_takes_over_twice_the_tuned_steps():
    slow = [point(b, steps_at(b)) for b in (8, 16)]
    slow.append(point(32, [s * 2.1 for s in steps_at(32)]))
    slow.append(point(64, steps_at(64)))  # whatever comes after
    found = claims(curve("tuned", TUNED), curve("sqrt", slow))["train, sqrt fails"]
    assert found.finding == "yes"
    assert "fails at 32: 2.10 [" in found.text
    near = [point(8, steps_at(8)), point(32, [s * 1.9 for s in steps_at(32)])]
    assert claims(curve("tuned", TUNED), curve("sqrt", near))["train, sqrt fails"].finding == "no"


def test_a_rule_that_scatters_about_twice_the_tuned_steps_has_not_failed():
    wide = [point(8, steps_at(8)), point(32, [s * f for s, f in zip(steps_at(32), (1.2, 2.5, 4.0), strict=True)])]
    found = claims(curve("tuned", TUNED), curve("sqrt", wide))["train, sqrt fails"]
    assert found.finding == "undetermined"
    assert "open at 32: " in found.text


def test_one_seed_that_does_not_reach_is_no_failure_of_the_rule():
    alone = tuple(point(b, steps_at(b, (1.0,))) for b in BATCHES)
    found = claims(curve("tuned", alone), curve("linear", [*alone[:3], point(64, [None])]))["train, linear fails"]
    assert found.finding == "undetermined"
    assert found.text.endswith("open at 16: 1 (one seed: no interval) times the tuned steps; reached by 0 of 1 at 64")


def test_a_rule_is_compared_with_the_constant_rate_too():
    constant = [point(b, [s * 1.5 for s in steps_at(b)]) for b in (8, 16, 32, 64)]
    sqrt = [*(point(b, steps_at(b)) for b in (8, 16, 32)), point(64, [s * 1.8 for s in steps_at(64)])]
    found = claims(curve("tuned", TUNED), curve("sqrt", sqrt), curve("constant", constant))
    better = found["train, sqrt beats constant"]
    assert better.finding == "yes"
    assert better.text.startswith("fewer steps than constant at 16, 32: 0.667 [")
    assert "train, constant beats constant" not in found


def test_a_rule_of_which_fewer_runs_reach_beats_nothing():
    constant = [point(b, [s * 1.5 for s in steps_at(b)]) for b in (8, 16)]
    found = claims(
        curve("sqrt", [point(8, steps_at(8)), point(16, [*steps_at(16)[:2], None])]), curve("constant", constant)
    )
    better = found["train, sqrt beats constant"]
    assert better.finding == "undetermined"
    assert "reached by 2 of 3 at 16" in better.text


def test_a_rule_beats_a_constant_rate_that_does_not_reach():
    constant = [point(8, steps_at(8)), *(point(b, [None] * 3) for b in (16, 32))]
    found = claims(curve("sqrt", [point(b, steps_at(b)) for b in (8, 16, 32)]), curve("constant", constant))
    assert found["train, sqrt beats constant"].finding == "yes"
    assert found["train, sqrt beats constant"].text.endswith("constant reached by 0 of 3 at 16, 32")


def test_without_tuned_rates_a_rule_fails_only_by_not_reaching():
    slow = [point(8, steps_at(8)), point(16, [s * 9 for s in steps_at(16)])]
    found = claims(curve("linear", slow))["train, linear fails"]
    assert found.finding == "undetermined"
    assert "no tuned rates" in found.text
    assert "holds" not in found.text


def test_where_tuned_rates_fail_too_the_rule_is_not_to_blame():
    """A batch too large for the steps that were given stops every rate."""
    tuned = (*TUNED[:3], point(64, [None] * 3))
    linear = (*(point(b, steps_at(b)) for b in (8, 16, 32)), point(64, [None] * 3))
    found = claims(curve("tuned", tuned), curve("linear", linear))["train, linear fails"]
    assert found.finding == "undetermined"
    assert found.text.startswith("holds to 32")
    assert "at 64 tuned rates fail too" in found.text


@pytest.mark.parametrize(
    ("large", "finding"),
    [
        ((0.35, 0.36, 0.34), "yes"),
        ((0.25, 0.26, 0.24), "no"),
        ((0.31, 0.28, 0.33), "undetermined"),
        ((0.35, None, None), "undetermined"),  # one seed
    ],
)
def test_generalization_is_paired_by_seed_at_equal_train_loss(large, finding):
    small = (0.30, 0.31, 0.29)  # unpaired, a spread of 0.01: the differences have none
    points = (point(8, steps_at(8), small), point(64, steps_at(64), (9.0,) * 3), point(512, steps_at(512), large))
    assert claims(curve("tuned", points))["tuned: gap"].finding == finding


def test_records_of_old_hold_no_test_loss_at_the_target():
    assert claims(curve("tuned", TUNED))["tuned: gap"].finding == "not measured"


def test_a_test_curve_says_nothing_of_generalization_at_equal_train_loss():
    found = claims(curve("tuned", TUNED, split="test"))
    assert not any("gap" in name for name in found)
    assert "no train target" in notes_on_claims(Convergence((curve("tuned", TUNED, split="test"),)))[0]


def test_no_sweep_no_section():
    assert check_claims(Run("", None, capacity())) == ()
    assert sections(Run("", None, capacity())) == []


def test_a_sweep_that_reached_nothing_says_so_in_one_line():
    missed = curve("tuned", [point(8, [None, None]), point(16, [None, None])])
    (section,) = sections(Run("", None, convergence=Convergence((missed,), base_batch=8)))
    assert section.lines == ()
    assert section.notes == ("not measured: fewer than two batch sizes reached a target",)


def test_what_was_not_measured_is_a_note_said_once():
    run = Run("", None, convergence=Convergence((curve("tuned", TUNED), curve("tuned", TUNED, split="test"))))
    [section] = sections(run)
    assert all("not measured" not in value for _, value in section.lines)
    assert sum("pybatch bench" in note for note in section.details) == 1
    assert any(note.startswith("train below capacity, test below capacity") for note in section.details)


def falling(test):
    """A run whose train loss halves every 100 steps, and whose test loss is as given."""
    steps = np.arange(401, dtype=np.int32)
    train = (2.0 ** (-steps / 100)).astype(np.float32)
    return Trajectory(steps, train, test(steps).astype(np.float32))


def test_the_other_loss_is_read_where_the_target_was_met():
    found = falling(lambda s: 1 + s / 400.0)
    crossing = found.crossing("train", 0.25)
    assert crossing is not None
    at = loss_at(found, "test", crossing.steps)
    # Both are means over the last fifth of the steps, of which a straight line's is its value at the middle.
    assert at == pytest.approx(1 + 0.9 * crossing.steps / 400, abs=2e-3)
    assert loss_at(found, "train", crossing.steps) == pytest.approx(0.25, rel=0.01)


def test_a_test_loss_that_broke_down_is_none():
    found = falling(lambda s: np.where(s > 100, math.nan, 1.0))
    assert loss_at(found, "test", 200.0) is None
    assert loss_at(found, "test", 0.0) == 1.0


def test_points_hold_the_other_loss_of_each_seed_at_the_best_rate():
    study, outcomes = Study({"train": 0.25}, (0, 1, 2), 400, search=True), []
    for seed, height in ((0, 1.0), (1, 2.0)):
        for lr, scale in ((0.5, 1.0), (0.1, 5.0)):
            trial = Trial("w", "sgd", Scaled({"lr": lr}), 8, seed, "fp32", "cpu")
            whole = falling(lambda s, height=height, scale=scale: np.full(len(s), height * scale))
            slow = Trajectory(whole.steps, whole.train ** (1 / scale), whole.test)
            outcomes.append(Outcome(trial, "met", whole if scale == 1.0 else slow, 0.0))
            study.take(outcomes[-1])
    found = summarized(8, "train", study, outcomes)
    assert found.learning_rate == 0.5
    assert found.other_losses == (1.0, 2.0, None)  # the third seed has not run


def problem(name, *curves):
    work = WorkloadInfo(name, "images", 100, "fp32", model="mlp")
    return Run("", None, convergence=Convergence(curves, optimizer="sgd", base_batch=8, workload=work))


def test_one_table_shows_where_each_rule_fails_on_each_problem():
    holds = curve("sqrt", TUNED[:4])
    fails = curve("sqrt", [*TUNED[:2], point(32, [s * 3 for s in steps_at(32)])])
    lost = curve("linear", [*TUNED[:3], point(64, [None] * 3)])
    tuned = curve("tuned", TUNED)
    runs = [problem("digits", tuned, holds, lost), problem("scenes", tuned, fails)]
    found = {(b.problem.split(",")[0], b.hold.rule): b.hold for b in breaks(runs)}
    assert (found["digits", "sqrt"].broken, found["digits", "sqrt"].held) == (None, 64)
    assert (found["scenes", "sqrt"].broken, found["digits", "linear"].broken) == (32, 64)
    [section] = factors.sections(runs)
    assert section.table.heads == ("problem", "sqrt", "linear")
    [digits, scenes] = section.table.rows
    assert digits == ("digits, mlp, sgd, train loss 0.100", "holds to 64", "fails at 64 (not reached)")
    assert scenes[1].startswith("fails at 32 (3 [")
    assert scenes[2] == "–"
    assert factors.sections(runs[:1]) == []
