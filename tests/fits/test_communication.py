"""The fit of communication: planted values come back, and the verdict counts what was fitted."""

import dataclasses
import math

import numpy as np
import pytest
from cases.verdicts import exact

from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError
from pybatch.fits.communication import AllReduce, fit_communication, step_s
from pybatch.records import CommunicationFit, Distributed, DistributedPoint

BYTES = 40_000_000


def planted(gamma, bandwidth, latency):
    return CommunicationFit(gamma, bandwidth, latency, BYTES, 0.0, 8)


def measured(truth, noise=0.0, seed=0):
    """Steps and all-reduces of 2, 4 and 8 devices under a known truth."""
    rng = np.random.default_rng(seed)
    points, reduces = [], []
    for devices in (2, 4, 8):
        for size in (1 << 12, 1 << 20, BYTES):
            transfer = 2 * (devices - 1) / devices * size / truth.bandwidth_bytes_per_s
            seconds = transfer + 2 * (devices - 1) * truth.latency_s
            reduces.append(AllReduce(devices, size, seconds * math.exp(noise * rng.normal())))
        for compute in (0.002, 0.01, 0.05):
            seconds = float(step_s(truth, compute, devices)) * math.exp(noise * rng.normal())
            points.append(DistributedPoint(devices, 8, 1e3 * compute, 1e3 * seconds))
    return points, reduces


@pytest.mark.parametrize("gamma", [1.0, 1.7, 4.0, 20.0])
@pytest.mark.parametrize(("bandwidth", "latency"), [(1e9, 2e-5), (1e11, 1e-5)])
def test_planted_values_come_back(gamma, bandwidth, latency):
    fit = fit_communication(*measured(planted(gamma, bandwidth, latency)), BYTES)
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-6)
    assert fit.latency_s == pytest.approx(latency, rel=1e-6)
    assert fit.gamma == pytest.approx(gamma, rel=0.02)
    assert fit.rms_log_error < 1e-3
    assert fit.devices == 8


def test_noisy_measurements_give_nearby_values():
    fit = fit_communication(*measured(planted(2.0, 1e9, 2e-5), noise=0.03), BYTES)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert fit.gamma == pytest.approx(2.0, rel=0.25)
    assert 0.01 < fit.rms_log_error < 0.06


def test_no_overlap_adds_and_full_overlap_takes_the_larger():
    network = 2 * 0.5 * BYTES / 1e9 + 2 * 2e-5
    assert step_s(planted(1.0, 1e9, 2e-5), 0.01, 2) == pytest.approx(0.01 + network)
    assert step_s(planted(32.0, 1e9, 2e-5), 0.01, 2) == pytest.approx(max(0.01, network), rel=0.03)
    assert step_s(planted(2.0, 1e9, 2e-5), 0.01, 1) == pytest.approx(0.01)


def test_too_little_for_a_fit_is_said():
    points, reduces = measured(planted(2.0, 1e9, 1e-5))
    with pytest.raises(UsageError, match="0 steps on several devices"):
        fit_communication([], reduces, BYTES)
    with pytest.raises(UsageError, match="1 all-reduces"):
        fit_communication(points, reduces[:1], BYTES)


def test_the_optimum_with_communication_is_brute_forces(fit):
    model = exact(fit, 3000.0, most=4096.0, communication=planted(1.5, 1e10, 2e-5))
    for devices in (2.0, 5.0, 64.0):
        grid = np.geomspace(1, 4096 * devices, 200_000)
        best = grid[np.argmin(model.time(grid, devices))]
        found = model.optimum(devices)
        assert model.time(found, devices) == pytest.approx(model.time(best, devices), rel=1e-4)
    assert model.optimum() == dataclasses.replace(model, communication=None).optimum()


def test_slow_communication_makes_fewer_devices_worth_it(run):
    noise = dataclasses.replace(run.noise, b_simple=2000.0, low=1800.0, high=2200.0)
    free = advise(run.capacity, noise)
    counts = []
    for bandwidth in (1e13, 1e11, 1e7):
        together = Distributed(2, "gloo", (), dataclasses.replace(planted(1.0, bandwidth, 1e-6), devices=2))
        verdict = advise(run.capacity, noise, None, together)
        counts.append(verdict.useful_devices)
        assert "communication measured on 2 devices" in verdict.text
        assert verdict.best_batch == free.best_batch  # of one device
    assert free.useful_devices >= counts[0] > counts[1] > counts[2] == 1
