"""Batch-size schedules: against dynamic programming, the noisy quadratic stepped through, and closed forms."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest

from pybatch import fit_steps
from pybatch import records as r
from pybatch.answer.course import Course, course_of, law
from pybatch.answer.schedule import plan_schedule, rate_rule_of
from pybatch.base.errors import UsageError

RATE = 0.02  # progress of a step of a very large batch, in ln of the loss
START, END = 1.0, 0.01


def noise_at(loss):
    """B_noise of the isotropic quadratic: constant covariance over a squared gradient that falls with the loss."""
    return 4.0 / loss


def descend(batch_at, end=END):
    """Losses, steps and examples of the noisy quadratic in expectation, at the best rate's share of every batch."""
    loss, examples, losses = START, 0, [START]
    while loss > end:
        batch = batch_at(examples)
        loss *= 1.0 - RATE / (1.0 + noise_at(loss) / batch)
        examples += batch
        losses.append(loss)
    return np.array(losses), len(losses) - 1, examples


def quadratic(batch=64, steps=None):
    """The course that a run at this batch sees, and its steps to the end."""
    losses, taken, _ = descend(lambda _: batch)
    critical = noise_at(losses[:-1])
    course = Course(batch, (np.arange(taken) + 0.5) * batch, critical, critical / 1.1, critical * 1.1, "noise")
    return course, taken


def fewest_steps(batches, examples, cells=240):
    """The optimum by dynamic programming over (loss, examples spent): fewest steps within so many, never above B_c."""
    losses = np.geomspace(START, END, cells + 1)
    middle = noise_at(np.sqrt(losses[1:] * losses[:-1]))
    share = math.log(START / END) / cells / RATE
    grid = 3000  # of examples
    unit = examples / grid
    best = np.zeros(grid + 1)
    for critical in middle[::-1]:
        after = np.full(grid + 1, np.inf)
        for batch in [size for size in batches if size <= max(critical, batches[0])]:
            spent, steps = share * (batch + critical) / unit, share * (1.0 + critical / batch)
            place = np.arange(grid + 1) - spent
            kept = np.where(place >= 0, np.interp(place, np.arange(grid + 1), best), np.inf)
            after = np.minimum(after, steps + kept)
        best = after
    return float(best[-1])


@pytest.mark.parametrize("cost", [0.1, 0.3, 0.8])
def test_on_the_noisy_quadratic_it_takes_what_it_says_and_is_near_the_optimum(cost):
    course, taken = quadratic()
    found = plan_schedule(course, steps=taken, cost=cost)
    _, steps, examples = descend(found.batch_at)
    assert steps == pytest.approx(found.steps, rel=0.03)
    assert examples == pytest.approx(found.examples, rel=0.03)
    sizes = [found.base_batch * 2.0**e for e in range(-6, 6)]
    assert steps <= 1.04 * fewest_steps([s for s in sizes if s <= course.critical.max()], examples)


def test_it_saves_what_it_says_against_the_fixed_batch_of_as_many_examples():
    course, taken = quadratic()
    found = plan_schedule(course, steps=taken, cost=0.2)
    _, steps, examples = descend(found.batch_at)
    _, fixed_steps, fixed_examples = descend(lambda _: found.fixed_batch)
    assert fixed_examples == pytest.approx(examples, rel=0.03)
    assert found.steps_saved == pytest.approx(1 - steps / fixed_steps, abs=0.02)
    assert found.steps_saved_low <= found.steps_saved <= found.steps_saved_high
    assert found.steps_saved > 0.15


def test_examples_above_the_fewest_are_those_asked_for():
    course, taken = quadratic()
    for cost in (0.05, 0.2, 0.5):
        found = plan_schedule(course, steps=taken, cost=cost, most=2**20)
        fewest = 4.0 / RATE * (1.0 / END - 1.0 / START)  # of ever smaller batches: noise_at over the rate, integrated
        _, _, examples = descend(found.batch_at)
        assert 0.75 * cost <= examples / fewest - 1 <= 1.1 * cost  # doublings are coarse


def test_a_constant_critical_batch_wants_one_batch():
    flat = Course(64, np.array([100.0, 1e6]), np.full(2, 500.0), np.full(2, 400.0), np.full(2, 600.0), "branches")
    found = plan_schedule(flat, examples=1e6, cost=0.128)
    assert [stage.batch for stage in found.stages] == [64]
    assert found.steps_saved == pytest.approx(0.0, abs=1e-9)
    assert found.steps == pytest.approx(1e6 / 64, rel=1e-3)
    assert found.answer == "Keep batch 64 for the whole run."
    assert found.cost == pytest.approx(0.128, rel=1e-3)
    assert "one batch for the whole run: the critical batch does not rise twofold along it" in texts(found)


def test_a_schedule_that_saves_next_to_nothing_is_not_advised():
    """Doublings are coarse: where the critical batch hardly rises, none beats the fixed batch by 2 %."""
    course = Course(64, np.array([1e3, 1e6]), np.array([420.0, 620.0]), np.full(2, 300.0), np.full(2, 900.0), "noise")
    for cost in (0.1, 0.2, 0.4, 1.0):
        found = plan_schedule(course, steps=20_000, cost=cost)
        assert len(found.stages) == 1
        assert found.cost <= 1.001 * cost
        assert r.Run.from_json(r.Run("", None, batch_schedule=found).to_json()).batch_schedule == found


def texts(found):
    return [note.text for note in found.notes]


def test_one_batch_is_told_with_its_cause():
    """A bound, or another batch than the run's: neither is a critical batch that hardly changes."""
    grown = plan_schedule(law(1.0, 0.5, 8e6, 8), steps=1e6, most=8)
    assert grown.answer == "Keep batch 8 for the whole run."
    assert any("no other between the bounds saves" in text for text in texts(grown))
    assert not any("rise" in text for text in texts(grown))
    moved = plan_schedule(law(4096.0, 0.0, 1.6e5, 8), steps=20_000)
    trade = "0.0175 times the steps of batch 8 for 12.3 % more examples"
    assert moved.answer == f"Use batch 512 for the whole run: {trade}."
    assert "and batch 8 20,000" in moved.because
    assert "Step times" not in moved.because
    smaller = plan_schedule(law(40.0, 0.0, 1.6e6, 64), steps=20_000)
    trade = "53.8 % fewer examples for 3.69 times the steps of batch 64"  # 73,846 of 8 for 20,000 of 64
    assert smaller.answer == f"Use batch 8 for the whole run: {trade}."
    assert smaller.because.endswith("Step times play no part in this: fewer examples may take longer.")
    timed = dataclasses.replace(law(40.0, 0.0, 1.6e6, 64), advised=384)
    said = "Step times play no part in this: with them the record's verdict is batch 384, of least time to the loss."
    assert plan_schedule(timed, steps=20_000).because.endswith(said)


def test_a_run_past_its_critical_batch_is_told_that_it_is():
    """What such a run could save by a schedule is little: its steps are near the fewest at any batch."""
    course, taken = quadratic(batch=1024)
    found = plan_schedule(course, steps=taken, least=1024)
    mean = course.batch / found.base_cost
    assert mean < 512
    assert f"batch 1,024 is above the critical batch along the run, {mean:.0f} on average, and no" in found.because
    below = plan_schedule(law(4096.0, 0.0, 1.6e5, 8), steps=20_000, most=8)
    assert "above" not in below.because


def test_a_cost_that_no_batch_keeps_is_told_as_it_is():
    found = plan_schedule(law(20.0, 0.0, 1e6, 64), examples=1e6, least=256)
    assert found.cost == pytest.approx(256 / 20, rel=0.01)
    assert any("20.0 % more examples than the fewest were asked for" in text for text in texts(found))


@pytest.mark.parametrize("end", [1e12, 1e20, 1.9e44, 1e300])
def test_an_interval_without_end_breaks_nothing(end):
    wide = Course(
        16, np.array([1e3, 1e5]), np.array([20.0, 200.0]), np.array([1e-9, 1e-9]), np.full(2, end), "branches"
    )
    found = plan_schedule(wide, examples=1e5)
    assert -0.5 < found.steps_saved_low <= found.steps_saved <= found.steps_saved_high < 1.0
    one = plan_schedule(wide, examples=1e5, least=16, most=16)
    assert (one.steps_saved_low, one.steps_saved_high) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))


def test_passes_divide_the_batch():
    found = plan_schedule(law(400.0, 0.0, 1e6, 64), examples=1e6, least=64, most=64, fits=24)
    assert [stage.passes for stage in found.stages] == [4]  # of 16: three would be of 21.3


def test_the_rate_follows_by_the_optimizer_that_trained():
    for optimizer, rule in (("sgd", "linear"), ("adamw", "sqrt"), (None, "sqrt")):
        assert rate_rule_of(r.Run("", None, convergence=r.Convergence((), optimizer=optimizer))) == rule


def test_stages_follow_each_other_and_rise():
    course, taken = quadratic()
    found = plan_schedule(course, steps=taken, cost=1.0, rate_rule="linear", fits=16, devices=2)
    step, examples = 1, 0
    for before, stage in zip((None, *found.stages), found.stages, strict=False):
        assert (stage.first_step, stage.first_example) == (step, examples)
        assert stage.rate_factor == stage.batch / 64
        assert stage.passes == math.ceil(stage.batch / 32)
        assert stage.batch % 2 == 0
        if before is not None:
            assert stage.batch > before.batch
        step, examples = step + stage.steps, examples + stage.examples
    assert (found.steps, found.examples) == (step - 1, examples)
    assert any("several passes" in note.text for note in found.notes)


def test_bounds_hold():
    course, taken = quadratic()
    found = plan_schedule(course, steps=taken, cost=1.0, least=32, most=128)
    assert {stage.batch for stage in found.stages} <= {32, 64, 128}


def test_a_noisy_reading_that_falls_makes_no_stage_of_its_own():
    """Readings scatter; the critical batch that is planned with rises."""
    course, taken = quadratic()
    rng = np.random.default_rng(0)
    places = np.linspace(0, len(course.examples) - 1, 25).astype(int)
    scatter = np.exp(0.4 * rng.standard_normal(25))
    values = course.critical[places] * scatter
    noisy = Course(64, course.examples[places], values, values / 2, values * 2, "noise")
    batches = [stage.batch for stage in plan_schedule(noisy, steps=taken).stages]
    assert batches == sorted(set(batches))
    exact = plan_schedule(course, steps=taken)
    assert plan_schedule(noisy, steps=taken).steps == pytest.approx(exact.steps, rel=0.2)


def test_a_law_has_the_closed_form_of_its_fewest_examples():
    """B_c = a D^b: B is proportional to sqrt(B_c), which grows 4-fold from stage to stage."""
    found = plan_schedule(law(1e-6, 1.5, 1e6, 64), examples=1e6)
    middles = [stage.critical_batch for stage in found.stages[:-1]][-3:]  # earlier ones are a few cells
    assert [b / a for a, b in pairwise(middles)] == pytest.approx([4.0] * (len(middles) - 1), rel=0.2)


def point(first, last, value, low, high, status="resolved"):
    return r.NoisePoint(first, last, value, low, high, 1.0, 1.0, status, 10)


def watched(points, batch=32):
    noise = r.NoiseScale(100, 80, 120, 1.0, 1.0, "resolved", "micro-batches", 10, trajectory=tuple(points))
    training = r.Training("train.py", "Net", "AdamW", batch=batch)
    return r.Run("", None, noise=noise, training=training)


def test_a_watched_run_is_read_in_its_own_steps():
    run = watched(
        [
            point(1, 100, 20.0, 10.0, 40.0),
            point(101, 200, None, None, None, "unresolved"),
            point(201, 300, None, 50.0, None, "lower_bound"),
            point(301, 400, 200.0, 100.0, 400.0),
        ]
    )
    course = course_of(run)
    assert course.batch == 32
    assert course.examples == pytest.approx([50.5 * 32, 250.5 * 32, 350.5 * 32])
    assert course.critical == pytest.approx([20.0, 50.0, 200.0])
    found = plan_schedule(course, steps=2000)
    said = " ".join(texts(found))
    assert "1 of 3 readings of the noise scale is a lower bound" in said
    assert "held at its last value" in said
    assert "confidence" not in found.because
    bounds = [point(100 * i + 1, 100 * i + 100, None, 50.0 * 1.5**i, None, "lower_bound") for i in range(8)]
    doubtful = plan_schedule(course_of(watched(bounds)), steps=2000)
    assert doubtful.answer == "No schedule can be advised yet."  # lower bounds pull the batch down alone
    assert doubtful.because.startswith("8 of 8 readings of the noise scale are lower bounds, and taken as they are. ")
    assert "batch" not in doubtful.because  # of what bounds alone would advise


def branched(*at):
    """A run with the critical batch at these steps of batch 16."""
    fits = [
        dataclasses.replace(
            fit_steps([8, 16, 32, 64], [1e3 * (1 + b / n) for n in (8, 16, 32, 64)]), low=b / 2, high=b * 2
        )
        for _, b in at
    ]
    points = [
        r.Branching(step, 1.0, 16, 4096, 0.9, 0.01, (r.BranchPoint(64, 0.1, (1.0,), (10.0,)),), None, None, None, fit)
        for (step, _), fit in zip(at, fits, strict=True)
    ]
    return r.Run("", None, convergence=r.Convergence((), 3, branches=tuple(points)))


def test_branches_of_a_run_come_before_its_noise():
    run = dataclasses.replace(branched((100, 20.0), (1000, 200.0)), noise=watched([]).noise)
    course = course_of(run)
    assert (course.source, course.batch) == ("branches", 16)
    assert course.examples == pytest.approx([1600, 16_000])
    assert course.critical == pytest.approx([20.0, 200.0], rel=0.01)
    assert plan_schedule(course, steps=1000).stages[0].batch < plan_schedule(course, steps=1000).stages[-1].batch


def test_branches_without_bounds_advise_no_schedule():
    run = branched((100, 20.0), (1000, 200.0))
    steps = run.convergence
    open_ = tuple(dataclasses.replace(at, fit=dataclasses.replace(at.fit, low=None)) for at in steps.branches)
    for branches, advised in ((steps.branches, True), ((steps.branches[0], open_[1]), True), (open_, False)):
        course = course_of(dataclasses.replace(run, convergence=dataclasses.replace(steps, branches=branches)))
        found = plan_schedule(course, steps=1000)
        assert (found.answer != "No schedule can be advised yet.") == advised
    assert found.because.startswith("2 of 2 critical batches along the run are not bounded on both sides. Branch with")


def test_a_record_survives_json_and_says_its_first_line():
    found = plan_schedule(*(lambda course, taken: (course,))(*quadratic()), steps=1000)
    run = r.Run("", None, batch_schedule=found)
    assert r.Run.from_json(run.to_json()).batch_schedule == found
    assert found.answer.startswith("Use batch ")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "give --steps N or --examples N"),
        ({"steps": 10, "examples": 10}, "one of them"),
        ({"steps": 0}, "steps 0 is out of range"),
        ({"steps": math.nan}, "steps nan is out of range"),
        ({"steps": 1}, "the first stage alone takes more"),
        ({"examples": 100}, "the first stage alone takes more, as a step is of 64 examples"),
        ({"steps": 100, "cost": 0.0}, "cost 0"),
        ({"steps": 100, "cost": math.inf}, "cost inf"),
        ({"steps": 100, "rate_rule": "square"}, "rate rule 'square'"),
        ({"steps": 100, "rate_rule": "tuned"}, "rate rule 'tuned'"),
        ({"steps": 100, "least": 100, "most": 10}, "Give bounds the other way round"),
        ({"steps": 100, "most": 100, "least": 65}, "no doubling of batch 64"),
        ({"steps": 100, "devices": 0}, "devices 0"),
        ({"steps": 100, "devices": 3}, "never divides over 3 devices. Give --batch"),
    ],
)
def test_bad_arguments(asked, says):
    with pytest.raises(UsageError, match=says):
        plan_schedule(quadratic()[0], **asked)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (r.Run("", None), "has 0 readings.*pybatch watch"),
        (dataclasses.replace(watched([]), training=None), "has one noise scale.*pybatch watch"),
        (watched([point(1, 10, 5.0, 3.0, 9.0)]), "1 reading of it; two are the least.*Watch the run for longer"),
    ],
)
def test_a_record_without_a_trajectory_says_what_to_measure(run, says):
    with pytest.raises(UsageError, match=says):
        course_of(run)


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.5), (1.0, -0.5), (1.0, 9.0), (1e30, 2.0)])
def test_bad_laws(a, b):
    with pytest.raises(UsageError, match="law"):
        law(a, b, 1e6, 64)
