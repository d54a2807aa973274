"""Frontier and doubling: against brute force over the time model, and by arithmetic."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from cases.verdicts import exact

from pybatch.answer.best import Best
from pybatch.answer.frontier import doubling, frontier, joules
from pybatch.answer.verdict import advise
from pybatch.records import BatchPoint


def test_each_point_is_the_best_of_its_devices(fit):
    model = exact(fit, 3000.0)
    points = frontier(model, model.useful_devices()[0], ())
    assert [p.devices for p in points] == [2**i for i in range(len(points))]
    grid = np.geomspace(1, 1e6, 200_000)
    alone = model.time(grid).min()
    for point in points:
        best = model.time(grid, point.devices).min()
        assert point.time_factor == pytest.approx(best / alone, rel=1e-4)
        assert point.cost_factor == pytest.approx(point.devices * best / alone, rel=1e-4)
        assert point.energy_factor is None
    assert points[0].time_factor == points[0].cost_factor == 1.0
    assert all(a.time_factor > b.time_factor for a, b in pairwise(points))
    assert all(a.cost_factor < b.cost_factor for a, b in pairwise(points))


def test_energy_is_joules_per_example_times_examples(fit):
    model = exact(fit, 100.0)
    batches = tuple(BatchPoint(b, "ok", 1.0, joules_per_sample=10.0 / b) for b in (1, 4, 1024))
    assert joules(4, batches) == 2.5
    assert joules(2, batches) == pytest.approx(5.0)
    assert joules(2048, batches) is None
    second = frontier(model, 8, batches)[1]
    base, batch = float(model.optimum()), float(model.optimum(2.0))
    wanted = (10 / (batch / 2)) * (batch + 100) / ((10 / base) * (base + 100))
    assert second.energy_factor == pytest.approx(wanted, rel=1e-6)


def test_doubling_by_arithmetic(fit):
    model = exact(fit, 64.0)
    best = Best(64, 64.0, 60, 70, False, model, None, (1.0, 1.0))
    twice = doubling(best, ())
    assert twice["batch"] == 128
    assert twice["examples_factor"] == pytest.approx((128 + 64) / (64 + 64))
    assert twice["steps_factor"] == pytest.approx(0.75)
    modelled = 0.75 * fit.step_s(128) / fit.step_s(64)
    for end in ("", "_low", "_high"):
        assert twice[f"time_factor{end}"] == pytest.approx(modelled, rel=1e-5)
    assert twice["energy_factor"] is None
    assert twice["step_times"] == "modelled"
    timed = (BatchPoint(64, "ok", 10.0, 9.9, 10.1), BatchPoint(128, "ok", 15.0, 14.7, 15.3))
    twice = doubling(best, timed)
    assert twice["time_factor"] == pytest.approx(0.75 * 1.5)  # the measured times, whatever the model says
    error = math.hypot(math.log(10.1 / 9.9) / 2, math.log(15.3 / 14.7) / 2)
    assert twice["time_factor_high"] == pytest.approx(0.75 * 1.5 * math.exp(error), rel=1e-3)
    assert twice["step_times"] == "measured"
    bounded = dataclasses.replace(best, ensemble=exact(fit, 64.0, most=100.0))
    assert doubling(bounded, ()) == {}


def test_the_verdict_carries_both(run):
    verdict = advise(run.capacity, run.noise)
    assert verdict.frontier[0].devices == 1
    assert verdict.why("doubling").inputs["batch"] == 2 * verdict.best_batch
