"""The verdict for every combination of evidence: what limits, the best batch by the closed form, what the notes owe.

What is expected is worked out here from the rules alone: a sweep goes before branches, branches before the noise
scale; B* = sqrt(critical batch x half batch) within memory; two sides compare beyond the error of both.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cases.verdicts import BATCHES, BRANCHES, MODELS, SWEEP, capacity, curve, noise, swept_by, throughput, unaccounted
from hypothesis import given, settings
from hypothesis import strategies as st

from pybatch.answer.critical import shaped
from pybatch.answer.time_model import TimeModel
from pybatch.answer.verdict import advise, time_model
from pybatch.fits.steps_model import predicted
from pybatch.records import (
    BatchPoint,
    Capacity,
    Convergence,
    StepsFit,
)

HALF = 40.0  # throughput(): 8 ms + 0.2 ms an example
SATURATION, SPREAD = 380.0, 1.05

# name -> (record, what it says of the critical batch: value, low, high)
NOISE = {
    "resolved": (noise(40), (40, 40 / 1.1, 40 * 1.1)),
    "lower bound": (noise(None, 900, status="lower_bound"), (None, 900, None)),
    "unresolved": (noise(None, status="unresolved"), None),
    "none": (None, None),
}


def out_of_memory():
    """Batches up to 64 ran, 128 ran out of memory; 96 fits."""
    fine = capacity(max_batch=96, batches=BATCHES[:7])
    return dataclasses.replace(fine, batches=(*fine.batches, BatchPoint(128, "oom", reason="out of memory")))


# name -> (record, the wall: what the device can take with its ends, the largest batch)
CAPACITY = {
    "saturated": (capacity(), (SATURATION, SATURATION / SPREAD, SATURATION * SPREAD), 100_000),
    "not saturated in memory": (capacity(max_batch=200), (200, 200, 200), 200),
    "out of memory": (out_of_memory(), (96, 96, 96), 96),
    "no fit": (Capacity(None, None, None, None, None, None, None, None, None, None), None, None),
}
CASES = list(itertools.product(NOISE, CAPACITY, SWEEP, BRANCHES))


def expected_limit(known, wall):
    if wall is None or known is None:
        return "unresolved"
    value, low, high = known
    if low is not None and low > wall[2]:
        return "hardware"
    if high is not None and high < wall[1]:
        return "noise"
    return "unresolved" if value is None else "balanced"


def expected_best(critical, most):
    """The closed form, rounded to a power of two, or down to a multiple of 8 where memory binds."""
    optimum = math.sqrt(critical * HALF)
    if optimum >= most:
        return most // 8 * 8
    nearest = 2 ** round(math.log2(optimum))
    return nearest if nearest <= most else 2 ** math.floor(math.log2(most))


@pytest.mark.parametrize(("noises", "device", "sweep", "branch"), CASES)
def test_every_combination(noises, device, sweep, branch):
    (scale, by_noise), (measured, wall, most) = NOISE[noises], CAPACITY[device]
    (swept, by_sweep), (branched, by_branch) = SWEEP[sweep], BRANCHES[branch]
    steps = Convergence((swept,), branches=(branched,) if branched else ())
    verdict = advise(measured, scale, steps)

    known = by_sweep or by_branch or by_noise
    source = "sweep" if by_sweep else "branch" if by_branch else "noise" if by_noise else None
    value, low, high = known or (None, None, None)
    assert verdict.critical_source == source
    assert (verdict.critical_batch, verdict.critical_low, verdict.critical_high) == (value, low, high)
    assert verdict.limit == expected_limit(known, wall)

    best = expected_best(value, most) if value is not None and wall is not None else None
    assert verdict.best_batch == best
    if value is None and wall is not None:  # bounds alone
        assert verdict.best_low == (None if low is None else math.floor(min(math.sqrt(low * HALF), most)))
        assert verdict.best_high == (None if high is None else math.ceil(math.sqrt(high * HALF)))
    timed = source == "sweep" and best is not None
    if timed:
        swept_steps = 500 * (1 + 200 / best)
        assert verdict.time_to_target == pytest.approx(swept_steps * throughput().step_s(best), rel=0.02)
    owed = {"critical_batch": value, "best_batch": best, "useful_devices": best, "time_to_target": timed or None}
    owed["saturation_batch"] = wall
    notes = {note.figure for note in verdict.notes}
    for figure, known_figure in owed.items():
        assert (f"verdict.{figure}" in notes) == (known_figure is None), figure
        assert (figure in {r.figure for r in verdict.reasons}) or known_figure is None, figure
    assert unaccounted(verdict) == set()


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("lower bound", "at least 4,100 (fitted to steps), above what the device can use"),
        ("upper bound", "Use batch 13 or smaller: the critical batch is at most 4 (fitted to steps), below what the"),
    ],
)
def test_a_bound_is_said_as_one(sweep, says):
    assert says in advise(capacity(), noise(40), Convergence((SWEEP[sweep][0],))).text


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("most", [math.inf, 60.0])
def test_the_best_batch_is_that_of_the_fitted_curve(model, most):
    """Against 40 000 batches tried one by one; the hyperbola through the same critical batch would say another."""
    fit = MODELS[model]
    grid = np.geomspace(1, min(most, 1e5), 40_000)
    time = np.array([predicted(model, fit.parameters, b) for b in grid]) * (0.008 + 2e-4 * grid)
    found = TimeModel(throughput(), fit.critical_batch, most, shape=fit)
    assert found.optimum() == pytest.approx(grid[np.argmin(time)], rel=5e-3)
    assert found.time(found.optimum()) * fit.s_min == pytest.approx(time.min(), rel=1e-4)
    if most == math.inf:
        hyperbola = TimeModel(throughput(), fit.critical_batch)
        assert abs(math.log(found.optimum() / hyperbola.optimum())) > 0.02  # four times what is allowed above


@pytest.mark.parametrize("model", MODELS)
def test_time_doubling_and_frontier_follow_the_fitted_curve(model):
    fit = MODELS[model]
    verdict = advise(capacity(), noise(40), swept_by(fit))
    best, step = verdict.best_batch, throughput().step_s

    def steps(batch):
        return predicted(model, fit.parameters, batch)

    assert verdict.time_to_target == pytest.approx(steps(best) * step(best), rel=1e-6)
    twice = verdict.why("doubling").inputs
    assert twice["steps_factor"] == pytest.approx(steps(2 * best) / steps(best))
    assert twice["time_factor"] == pytest.approx(steps(2 * best) * step(2 * best) / (steps(best) * step(best)))
    grid = np.geomspace(1, 1e5, 20_000)
    curve = np.array([steps(b) for b in grid])
    alone = (curve * (0.008 + 2e-4 * grid)).min()
    for point in verdict.frontier:
        wanted = (curve * (0.008 + 2e-4 * grid / point.devices)).min()
        assert point.time_factor == pytest.approx(wanted / alone, rel=1e-3)
    assert model in verdict.why("best_batch").text
    assert verdict.why("critical_batch").inputs["model"] == model
    assert unaccounted(verdict) == set()


def test_an_end_of_the_interval_moves_the_curve_along_the_batch_axis():
    """On a hyperbola that is the same as another critical batch."""
    fit = StepsFit("power", 300.0, 150.0, 100.0, 220.0, None, None, None, parameters={
        "s_min": 300.0, "b_c": 150.0, "alpha": 1.0})  # fmt: skip
    for critical in (100.0, 150.0, 220.0):
        moved = TimeModel(throughput(), critical, shape=fit)
        assert moved.steps(64.0) == pytest.approx(1 + critical / 64)
        assert moved.optimum() == pytest.approx(math.sqrt(critical * HALF), rel=2e-3)


@given(
    alpha=st.floats(1e-6, 1.0),
    half=st.floats(0.5, 1e5),
    critical=st.floats(0.5, 1e6),
    width=st.floats(1.01, 30.0),
    most=st.one_of(st.none(), st.integers(1, 10**6)),
    examples=st.one_of(st.none(), st.integers(1, 10**6)),
    source=st.sampled_from(["noise", "lower bound", "sweep", "bound", *MODELS]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_number_said_is_in_the_record(alpha, half, critical, width, most, examples, source):
    """Whatever was measured: no sentence has a number of its own, and the interval holds the optimum."""
    device = capacity(throughput(alpha=alpha, beta=alpha / half), max_batch=most, examples=examples)
    scale = noise(critical, critical / width, critical * width)
    steps = None
    if source == "lower bound":
        scale = noise(None, critical, status="lower_bound")
    elif source == "sweep":
        steps = Convergence((curve(critical, critical / width, critical * width),))
    elif source == "bound":
        steps = Convergence((curve(None, critical, None),))
    elif source in MODELS:
        steps = swept_by(MODELS[source])
    verdict = advise(device, scale, steps)
    assert unaccounted(verdict) == set()
    if verdict.best_batch is not None:
        assert verdict.best_batch <= min(most or math.inf, examples or math.inf)
        optimum = verdict.why("best_batch").inputs["optimum"]
        assert verdict.best_low <= optimum
        assert verdict.best_high is None or optimum <= verdict.best_high


def test_only_a_curve_that_is_known_has_a_shape():
    assert shaped(None) is None
    assert shaped(dataclasses.replace(MODELS["power"], model="hyperbola")) is None
    assert shaped(dataclasses.replace(MODELS["power"], parameters={})) is None
    assert shaped(dataclasses.replace(MODELS["power"], critical_batch=None)) is None
    assert shaped(MODELS["power"]) is MODELS["power"]
    assert time_model(capacity(), None, None) is None
    assert time_model(capacity(), None, swept_by(MODELS["power"])).shape is MODELS["power"]
