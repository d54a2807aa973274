"""A sweep in every format: what a reader must find there."""

import csv
import dataclasses
import io
import json

import pytest
from cases.points import point

from pybatch.records import (
    Branching,
    BranchPoint,
    Convergence,
    ConvergencePoint,
    Curve,
    NoisePoint,
    NoiseScale,
    NoiseTrajectory,
    Note,
    RateSteps,
    Run,
    StepsFit,
)
from pybatch.report import noise as noise_report
from pybatch.report.formats.text import FORMATS, render
from pybatch.report.rates import heat_map


@pytest.fixture
def swept(run):
    fit = StepsFit("hyperbola", 120.0, 46.0, 40.0, 53.0, 9.2, 46.0, 184.0)
    tuned = Curve(
        "tuned",
        "train",
        (point(8, 900.0), point(64, 166.0, edge=True), point(512, 130.0, reached=2)),
        120.0,
        46.0,
        40.0,
        53.0,
        target=0.1,
        fit=fit,
        noise_ratio=0.5,
        noise_ratio_low=0.4,
        noise_ratio_high=0.7,
    )
    failed = (point(8, 900.0), point(64, None, 0), point(512, None, 0, status="diverged", rate=None))
    linear = Curve(
        "linear", "train", failed, None, None, 64.0, None, target=0.1, notes=(Note("points", "said of linear"),)
    )
    test = dataclasses.replace(tuned, split="test", target=0.2, noise_ratio=None)
    where = {"device": run.capacity.device, "workload": run.capacity.workload}
    steps = Convergence(
        (linear, tuned, test),
        (Note("curves", "said of all"),),
        optimizer="sgd",
        seeds=3,
        trials=108,
        **where,
    )
    return Run(run.created, run.environment, noise=run.noise, convergence=steps)


@pytest.mark.parametrize("format_", ["table", "md"])
def test_a_page_has_the_steps_the_reach_rates_and_the_critical_batches(swept, format_):
    text = " ".join(render(swept, format_).replace("\\", "").split())
    assert "Steps to train loss 0.100" in text
    assert "Steps to test loss 0.200" in text
    for part in ("900", "166", "0.50*", "130 (2/3)", "not reached (0/3)", "diverged (0/6)", "108 trials"):
        assert part in text, part
    assert "46 [40 to 53] images" in text
    assert "at least 64 images" in text
    assert "0.500 [0.400 to 0.700]" in text
    assert text.count("said of all") == 1
    assert "linear points: said of linear" in text


def test_steps_in_other_units_open_ends_and_a_price_without_step_times_are_said(swept):
    points = (point(32, 11.15), point(64, 6.02), point(512, 2.0), point(1024, 1.77))
    logged = dataclasses.replace(
        swept.convergence.curves[1], points=points, b_min=32.0, b_min_high=53.2, fit=None, s_min=1.49
    )
    small = Curve("linear", "train", points, None, None, None, 1.0, target=0.1)
    run = dataclasses.replace(swept, convergence=Convergence((logged, small)), price=2.5)
    text = " ".join(render(run, "table").split())
    for part in (
        "11.2",
        "6.02",
        "1.77",
        "at batch 32, the smallest tested, or up to 53.2",
        "critical, linear at most 1 example ",
        "cost not known: step times were not measured",
    ):
        assert part in text, part


def test_a_note_of_several_rules_is_said_once(swept):
    both, own = Note("critical_batch", "said of both"), Note("critical_batch", "said of one")
    linear, tuned, _ = swept.convergence.curves
    curves = dataclasses.replace(linear, notes=(both,)), dataclasses.replace(tuned, notes=(both, own))
    text = " ".join(render(dataclasses.replace(swept, convergence=Convergence(curves)), "table").split())
    assert text.count("said of both") == 1
    assert "linear, tuned critical_batch: said of both" in text
    assert "· tuned critical_batch: said of one" in text


def test_csv_has_one_row_a_point(swept):
    rows = list(csv.DictReader(io.StringIO(render(swept, "csv"))))
    assert len(rows) == 9
    assert [rows[3][key] for key in ("rule", "split", "batch", "steps", "reached")] == [
        "tuned",
        "train",
        "8",
        "900.0",
        "3",
    ]
    assert rows[1]["steps"] == ""
    assert rows[0]["workload"] == "digits"


def test_jsonl_has_points_and_the_whole_section(swept):
    lines = [json.loads(line) for line in render(swept, "jsonl").splitlines()]
    assert [line["record"] for line in lines] == ["run", *["point"] * 9, "noise", "convergence"]
    assert lines[-1]["curves"][1]["fit"]["model"] == "hyperbola"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_sweep_without_points_is_printed(swept, format_):
    bare = dataclasses.replace(swept.convergence.curves[0], points=())
    render(dataclasses.replace(swept, convergence=Convergence((bare,))), format_)


@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_branches_have_a_row_each(run, format_):
    points = (BranchPoint(32, 0.1, (0.5, 0.6), (40.0, None)), BranchPoint(64, 0.2, (0.5, 0.6), (21.0, 22.0)))
    fit = StepsFit("hyperbola", 10.0, 90.0, 70.0, None, None, 90.0, None)
    branching = Branching(200, 0.9, 32, 4096, 0.8, 0.02, points, 64, 32, None, fit)
    text = render(Run(run.created, run.environment, convergence=Convergence((), branches=(branching,))), format_)
    if format_ == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    else:
        rows = [row for row in map(json.loads, text.splitlines()) if row["record"] == "point"]
    assert [(int(row["step"]), int(row["batch"]), float(row["learning_rate"])) for row in rows] == [
        (200, 32, 0.1),
        (200, 64, 0.2),
    ]
    assert {float(row["critical_batch"]) for row in rows} == {90.0}
    assert str(rows[0]["steps"]).replace("None", "null") == "[40.0, null]"


def test_a_trajectory_has_a_row_a_stretch():
    stretch = NoisePoint(0, 99, 40.0, 30.0, 50.0, 1.0, 40.0, "resolved", 100)
    text = render(Run("", None, trajectory=NoiseTrajectory((stretch, stretch), "ddp")), "csv")
    assert [row["b_simple"] for row in csv.DictReader(io.StringIO(text))] == ["40.0", "40.0"]


def test_a_watched_run_says_of_which_steps_its_scale_is_and_draws_the_run():
    stretches = tuple(
        NoisePoint(400 * i + 1, 400 * (i + 1), 100.0 * (i + 1), 80.0, 120.0, 1.0, 100.0, "resolved", 400)
        for i in range(2)
    )
    noise = NoiseScale(
        200.0, 150.0, 280.0, 1.0, 200.0, "resolved", "ddp", 400, first_step=401, last_step=800, trajectory=stretches
    )
    assert "over steps 401 to 800" in render(Run("", None, noise=noise), "table")
    [along] = noise_report.plots(noise, None, "images")
    assert [100.0, 200.0] in [trace["y"] for trace in along.traces]
    text = render(Run("", None, trajectory=NoiseTrajectory(stretches, "ddp")), "table")
    assert "newest" in text
    assert "over steps 401 to 800" in text


@pytest.mark.parametrize("rate", [None, 0.3])
def test_a_best_rate_that_was_not_tried_is_not_drawn(rate):
    """As a record of somebody else may have it; of those tried the map stands."""
    tried = RateSteps(0.1, (50.0,), ("reached",))
    points = [ConvergencePoint(8, 50.0, "reached", 1, of, reached=1, rates=(tried,)) for of in (rate, 0.1)]
    plots = [heat_map(Curve("tuned", "train", (p,), None, None, None, None), "train", "1", "images") for p in points]
    assert [len(plot.traces) for plot in plots] == [1, 2]
