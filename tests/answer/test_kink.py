"""A sweep's steps that bend in a kink: the sharpest curve is drawn beside the one fitted, by its likelihood."""

import numpy as np
import pytest

from pybatch.answer.ensemble import _kink
from pybatch.fits import steps_model

SIZE = 2.0 ** np.arange(2, 11)


def smooth(sharpness, size=SIZE, bend=100.0):
    return steps_model.log_steps("smooth", np.log([[50.0, bend, sharpness]]), size)[0][0]


@pytest.mark.parametrize("error", [0.02, 0.1])
def test_a_kink_is_found_where_the_steps_leave_it_possible(error):
    rng = np.random.default_rng(3)
    truth = np.log(50 * np.maximum(1.0, 100.0 / SIZE))
    for _ in range(20):
        steps = truth + error * rng.standard_normal(len(SIZE))
        found, weight = _kink(np.log([50.0, 100.0, 8.0]), SIZE, steps, np.full(len(SIZE), error**2))
        assert np.exp(found[1]) == pytest.approx(100.0, rel=6 * error / np.sqrt(5))
        assert np.exp(found[2]) == pytest.approx(steps_model.SHARPNESS[1])
        assert 0.2 < weight <= 0.5


def test_a_soft_bend_leaves_none():
    fitted = np.log([50.0, 100.0, 1.5])
    _, weight = _kink(fitted, SIZE, smooth(1.5), np.full(len(SIZE), 0.02**2))
    assert weight < 1e-6
    _, doubtful = _kink(fitted, SIZE, smooth(1.5), np.full(len(SIZE), 0.3**2))
    assert doubtful > 0.2
