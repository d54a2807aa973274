"""Learning-rate rules: what each makes of a parameter group, and what it refuses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybatch import scaling
from pybatch.base.errors import UsageError
from pybatch.scaling import Base, followed, gain, scale

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 0.5, "momentum": 0.9}


@pytest.mark.parametrize("rule", sorted(scaling.rules()))
def test_the_base_batch_keeps_its_group(rule):
    scaled = scale(rule, ADAM, 32, Base(32, 1000))
    assert scaled.group["betas"] == pytest.approx(ADAM["betas"])
    assert {**scaled.group, "betas": 0} == {**ADAM, "betas": 0}
    assert scaled.warmup_steps == 0
    assert scaled.gain_batch is None


@pytest.mark.parametrize("rule", sorted(scaling.rules()))
def test_a_rule_returns_the_whole_group_and_leaves_the_given_one(rule):
    group = dict(ADAM)
    scaled = scale(rule, group, 64, Base(32, 1000))
    assert set(scaled.group) == set(ADAM)
    assert group == ADAM
    assert scaled.group["weight_decay"] == 0.1


@pytest.mark.parametrize(("rule", "factor"), [("constant", 1), ("tuned", 1), ("sqrt", 4), ("linear", 16)])
def test_rates_at_sixteen_base_batches(rule, factor):
    assert scale(rule, SGD, 128, Base(8)).group["lr"] == pytest.approx(0.5 * factor)


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 0.5), ("linear", 0.25)])
def test_rates_fall_below_the_base_batch(rule, factor):
    scaled = scale(rule, SGD, 2, Base(8, 500))
    assert scaled.group["lr"] == pytest.approx(0.5 * factor)
    assert scaled.warmup_steps == 0  # nothing to warm up to


def test_linear_warms_up_from_the_base_rate_over_the_same_examples():
    base = Base(8, 900)
    for batch in (16, 64, 256):
        scaled = scale("linear", SGD, batch, base)
        examples = scaling.WARMUP_SHARE * 900 * 8
        assert scaled.warmup_steps == math.ceil(examples / batch)
        rates = [scaled.lr(step) for step in range(scaled.warmup_steps + 3)]
        assert rates == sorted(rates)
        assert rates[0] > 0.5
        assert rates[scaled.warmup_steps - 1] == pytest.approx(scaled.group["lr"])
        assert rates[-1] == scaled.group["lr"]


@given(st.floats(1, 30))
def test_adam_sde_keeps_the_continuous_limit(k):
    """lr^2 / (1 - beta) and lr x eps do not change with the batch: what Malladi et al. derive the rule from."""
    batch = round(k * 100)
    k = batch / 100
    scaled = scale("adam-sde", {**ADAM, "betas": (0.97, 0.999)}, batch, Base(100)).group
    assert scaled["lr"] ** 2 / (1 - scaled["betas"][1]) == pytest.approx(1e-3**2 / (1 - 0.999))
    assert scaled["lr"] ** 2 / (1 - scaled["betas"][0]) == pytest.approx(1e-3**2 / (1 - 0.97))
    assert scaled["lr"] * scaled["eps"] == pytest.approx(1e-3 * 1e-8)
    assert scaled["lr"] == pytest.approx(1e-3 * math.sqrt(k))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adam-sde", ADAM, 352, Base(32)), "ends at batch 320"),
        (("adam-sde", SGD, 64, Base(32)), "no betas"),
        (("adascale", SGD, 40, Base(32)), "no multiple"),
        (("cosine", SGD, 64, Base(32)), "Known: adam-sde"),
        (("linaer", SGD, 64, Base(32)), "Did you mean 'linear'"),
        (("sqrt", {"lr": 0.0}, 64, Base(32)), "rate above 0"),
        (("sqrt", SGD, 0, Base(32)), "below 1"),
    ],
)
def test_what_a_rule_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        scale(*arguments)
    with pytest.raises(UsageError, match="base batch 0"):
        Base(0)


def test_the_largest_batch_adam_sde_names_is_one_it_takes():
    assert min(scale("adam-sde", ADAM, 320, Base(32)).group["betas"]) >= 0


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6), st.integers(1, 1000))
def test_a_gain_lies_between_one_and_the_ratio(trace, grad_sq, ratio):
    assert 1 - 1e-9 <= gain(trace, grad_sq, ratio) <= ratio * (1 + 1e-9)


def test_gain_limits():
    assert gain(1e3, 1e-9, 16) == pytest.approx(16, rel=1e-3)  # all noise: the linear rule
    assert gain(1e-5, 1e3, 16) == pytest.approx(1, rel=1e-3)  # no noise: the constant one
    assert gain(-5.0, 1.0, 16) == pytest.approx(1, rel=1e-3)  # an unlucky estimate
    noise = np.array([1.0, 2.0, 5.0, 9.0])
    assert all(np.diff([gain(v, 1.0, 8) for v in noise]) > 0)


def test_a_rule_of_ones_own():
    @scaling.register("half")
    def half(group, batch, base):
        return scaling.Scaled({**group, "lr": group["lr"] / 2})

    try:
        assert scale("half", SGD, 64, Base(32)).group["lr"] == 0.25
    finally:
        del scaling._rules["half"]


def test_beta2_keeps_its_half_life_in_examples_and_decay_is_in_proportion():
    group = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.2}
    assert followed(group, 64, 16) == group
    for batch in (4, 16, 64, 4096):
        found = followed(group, batch, 16, "half-life", "linear")
        assert found["betas"][0] == 0.9
        examples = batch * math.log(0.5) / math.log(found["betas"][1])
        assert examples == pytest.approx(16 * math.log(0.5) / math.log(0.95))
        assert found["weight_decay"] / batch == pytest.approx(0.2 / 16)
        assert found["lr"] == 0.1
    assert group["betas"] == (0.9, 0.95)


def test_decays_timescale_in_examples_is_kept_at_every_rate():
    group = {"lr": 0.1, "weight_decay": 0.2}
    for batch, rate in ((4, 0.5), (64, 2.0), (64, 1.0)):
        found = followed(group, batch, 16, decay="timescale", rate=rate)
        assert batch / (0.1 * rate * found["weight_decay"]) == pytest.approx(16 / (0.1 * 0.2))
    assert found == followed(group, 64, 16, decay="linear", rate=3.0)


@pytest.mark.parametrize(
    ("group", "rules", "said"),
    [
        ({"lr": 0.1}, {"beta2": "half-life"}, "no second beta"),
        ({"lr": 0.1, "betas": (0.9,)}, {"beta2": "half-life"}, "no second beta"),
        ({"lr": 0.1, "weight_decay": 0.0}, {"decay": "linear"}, "no weight decay"),
        ({"lr": 0.1}, {"beta2": "halflife"}, "Did you mean 'half-life'"),
        ({"lr": 0.1}, {"decay": "linea"}, "Did you mean 'linear'"),
    ],
)
def test_what_there_is_nothing_to_follow_for_is_refused(group, rules, said):
    with pytest.raises(UsageError, match=said):
        followed(group, 8, 4, **rules)
