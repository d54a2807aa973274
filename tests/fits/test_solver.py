"""The batched solver: rows arrive where they would by themselves, however long the others take."""

import numpy as np
import pytest

from pybatch.fits import solver
from pybatch.fits.throughput_model import polish


def rosenbrock(p, rows):
    """Least squares of (10 (y - x^2), 1 - x), in log-parameters: a bent valley, in which steps are rejected."""
    x, y = np.exp(p).T
    residual = np.stack([10 * (y - x**2), 1 - x], -1)
    slope = np.stack([np.stack([-20 * x * x, 10 * y], -1), np.stack([-x, 0 * x], -1)], -2)
    force = -np.einsum("rkp,rk->rp", slope, residual)
    return (residual**2).sum(-1) / 2, force, np.einsum("rkp,rkq->rpq", slope, slope)


def floors(rows=200):
    """Starts and times of a curve with a floor, 5 % apart."""
    size = 2.0 ** np.arange(10)
    rng = np.random.default_rng(0)
    data = np.log(np.maximum(1e-3 + 2e-5 * size, 1.5e-3)) + 0.05 * rng.standard_normal((rows, len(size)))
    start = np.tile(np.log([2e-5, 50.0, 1.5e-3]), (rows, 1))
    return start, size, data


@pytest.fixture
def patient(monkeypatch):
    """No row is left before all rounds are over."""
    return lambda: monkeypatch.setattr(solver, "_IDLE", 10**9)


def valleys():
    start = np.log(np.random.default_rng(1).uniform(0.1, 4.0, (200, 2)))
    return solver.minimize(start, rosenbrock, np.full(2, -20.0), np.full(2, 20.0))


@pytest.mark.parametrize("solve", [valleys, lambda: polish(*floors())], ids=["valleys", "floors"])
def test_a_row_is_left_where_it_has_arrived(solve, patient):
    _, cost = solve()
    patient()
    _, least = solve()
    assert (cost <= least * (1 + 1e-5) + 1e-12).mean() >= 0.99
    assert (cost <= least * 1.01 + 1e-12).all()


def test_a_row_does_not_depend_on_those_beside_it():
    start, size, data = floors()
    together, _ = polish(start, size, data)
    alone = np.concatenate([polish(start[i : i + 1], size, data[i : i + 1])[0] for i in range(20)])
    np.testing.assert_allclose(together[:20], alone, rtol=1e-9)
