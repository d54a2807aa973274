"""The noise scale's estimator against closed forms: unbiased pairs, an interval that holds what it says."""

import math

import numpy as np
import pytest

from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import RING, NoiseAccumulator
from pybatch.fits.noise import estimate, estimate_layers, fieller, judge, merge, pair


def closed_form(scales, error, label_noise):
    """|G|^2 and tr(Sigma) of the squared loss of x ~ N(0, diag(scales)) with labels of this noise variance."""
    grad_sq = float(np.sum((scales * error) ** 2))
    return grad_sq, grad_sq + (float(np.sum(scales * error**2)) + label_noise) * float(np.sum(scales))


def draw_pairs(rng, scales, error, label_noise, micro_batch, members, pairs):
    """Rows [pairs, 3] of one pair each, from simulated per-example gradients (e.x - noise) x."""
    x = rng.standard_normal((pairs, members, micro_batch, len(scales)), dtype=np.float32)
    x *= np.sqrt(scales).astype(np.float32)
    residual = x @ error.astype(np.float32)
    residual -= np.float32(math.sqrt(label_noise)) * rng.standard_normal(residual.shape, dtype=np.float32)
    mean = (residual[..., None, :] @ x)[..., 0, :].astype(np.float64) / micro_batch
    small, large = (mean**2).sum(-1).mean(-1), (mean.mean(-2) ** 2).sum(-1)
    return np.stack([np.ones(pairs), *pair(small, large, micro_batch, micro_batch * members)], axis=1)


ISOTROPIC = (np.ones(63), np.full(63, 0.5), 0.0)  # B_simple = d + 1 = 64
DECAYING = (1 / np.arange(1, 41), np.full(40, 0.5))


def test_the_closed_form_of_isotropic_regression():
    assert closed_form(*ISOTROPIC) == (15.75, 1008.0)


@pytest.mark.parametrize("kind", [float, np.asarray])
def test_pair_inverts_the_expectation(kind):
    """E|g_n|^2 = |G|^2 + tr(Sigma) / n for both norms gives both back."""
    grad_sq, trace = pair(kind(15.75 + 1008 / 8), kind(15.75 + 1008 / 32), 8, 32)
    assert float(grad_sq) == pytest.approx(15.75, rel=1e-12)
    assert float(trace) == pytest.approx(1008, rel=1e-12)


def test_pairs_are_unbiased_and_wrong_arithmetic_is_not():
    rows = draw_pairs(np.random.default_rng(0), *ISOTROPIC, 4, 4, 20_000)
    standard_error = rows.std(axis=0) / math.sqrt(len(rows))
    score = np.abs(rows.mean(axis=0)[1:] - [15.75, 1008]) / standard_error[1:]
    assert (score < 3.5).all()
    # |g_large|^2 itself for |G|^2, the usual mistake, is off by tr(Sigma) / 16 = 63: far outside the same bound.
    assert 63 / standard_error[1] > 50


CASES = {
    "isotropic": (*ISOTROPIC, 4, 4, 64),
    "isotropic, few pairs": (*ISOTROPIC, 8, 8, 32),
    "strong signal": (*DECAYING, 0.5, 4, 4, 64),
    "even": (*DECAYING, 10.0, 4, 16, 64),
    "weak signal": (*DECAYING, 100.0, 4, 16, 64),
}


@pytest.fixture(scope="module")
def repeats():
    """400 estimates per case, beside the truth."""
    rng, found = np.random.default_rng(20180731), {}
    for name, case in CASES.items():
        grad_sq, trace = closed_form(*case[:3])
        found[name] = trace / grad_sq, [draw_pairs(rng, *case) for _ in range(400)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_interval_holds_the_truth(repeats, case):
    truth, draws = repeats[case]
    noises = [estimate(rows, source="test") for rows in draws]
    held = [
        (n.low is None or n.low <= truth) and (n.high is None or truth <= n.high) for n in noises
    ]  # an open end holds everything: Fieller's set, not the number, is what covers
    assert 0.93 <= np.mean(held) <= 0.97
    resolved = np.mean([n.status == "resolved" for n in noises])
    assert resolved < 0.2 if case == "weak signal" else resolved > 0.95


def test_wrong_estimators_are_caught():
    """Small groups against a large scale: the mean of ratios, and clamping before averaging, are far off."""
    rows = draw_pairs(np.random.default_rng(5), *ISOTROPIC, 2, 2, 40_000)
    noise = estimate(rows, source="test")
    assert noise.low <= 64 <= noise.high
    assert noise.b_simple == pytest.approx(64, rel=0.15)
    clamped = rows[:, 2].mean() / np.maximum(rows[:, 1], 0.0).mean()
    mean_of_ratios = (rows[:, 2] / rows[:, 1]).mean()
    for wrong in (clamped, mean_of_ratios):
        assert not noise.low <= wrong <= noise.high
        assert abs(wrong - 64) > 0.2 * 64


def test_a_narrower_interval_would_be_caught(repeats):
    truth, draws = repeats["isotropic"]
    ends = [fieller(rows, confidence=0.90) for rows in draws]
    assert np.mean([low <= truth <= high for low, high, _ in ends]) < 0.93


def blocks(grad, trace, spread, count=40, seed=0):
    """Blocks of one pair with these exact means and about this spread."""
    noise = np.random.default_rng(seed).standard_normal((count, 2))
    noise -= noise.mean(axis=0)
    return np.column_stack([np.ones(count), grad + spread * noise[:, 0], trace + spread * noise[:, 1]])


@pytest.mark.parametrize(
    ("grad", "trace", "status", "says"),
    [
        (2.0, 10.0, "resolved", None),
        (0.1, 10.0, "lower_bound", "not separated from zero: only a lower bound"),
        (-0.1, 10.0, "lower_bound", "not separated from zero: only a lower bound"),
        (0.1, 0.1, "unresolved", "neither"),
        (-2.0, 10.0, "unresolved", "not independent draws"),
        (2.0, -10.0, "unresolved", "not independent draws"),
        (2.0, -0.05, "resolved", "not separated from zero"),
    ],
)
def test_status(grad, trace, status, says):
    noise = estimate(blocks(grad, trace, 1.0), source="test", small_batch=8, large_batch=32)
    assert noise.status == status
    assert noise.grad_sq == pytest.approx(grad)  # never clamped
    assert noise.trace == pytest.approx(trace)
    assert (noise.b_simple is None) == (status != "resolved")
    assert (noise.low is None) == (status == "unresolved")
    assert (noise.high is None) == (status != "resolved")
    if says is None:
        assert noise.b_simple == pytest.approx(trace / grad)
        assert noise.low < noise.b_simple < noise.high
    else:
        assert says in noise.notes[0].text
    if trace < 0 and status == "resolved":
        assert noise.b_simple == noise.low == 0.0
        assert noise.high > 0


def test_fieller_solves_its_own_equation():
    """At both ends, trace - r * grad is exactly at the edge of separation from zero."""
    rows = blocks(2.0, 10.0, 3.0)
    low, high, _ = fieller(rows)
    for end in (low, high):
        z = rows[:, 2] - end * rows[:, 1]
        t = z.mean() / (z.std(ddof=1) / math.sqrt(len(z)))
        assert abs(t) == pytest.approx(2.0227, abs=1e-3)  # Student's t(39) at 97.5 %


def test_no_pairs_too_few_and_broken_rows():
    empty = estimate(np.zeros((3, 3)), source="test", single=3)
    assert (empty.status, empty.steps, empty.grad_sq) == ("unresolved", 0, None)
    assert "two or more micro-batches" in empty.notes[0].text
    assert "3 steps had one micro-batch" in empty.notes[1].text
    few = estimate(blocks(2.0, 10.0, 0.1, count=7), source="test")
    assert few.status == "unresolved"
    assert "7 blocks" in few.notes[0].text
    broken = blocks(2.0, 10.0, 0.1)
    broken[3, 1] = math.inf
    assert estimate(broken, source="test").status == "unresolved"
    with pytest.raises(UsageError, match=r"\(4,\)"):
        estimate(np.zeros(4), source="test")


def test_rows_without_pairs_do_not_count():
    rows = blocks(2.0, 10.0, 1.0)
    gaps = np.zeros((2 * len(rows), 3))
    gaps[::2] = rows
    assert estimate(gaps, source="x") == estimate(rows, source="x")


def test_equal_blocks_without_spread_are_exact():
    noise = estimate(np.tile([1.0, 2.0, 10.0], (20, 1)), source="x")
    assert noise.low == pytest.approx(noise.high) == pytest.approx(5.0)


def test_merging_keeps_sums_and_order():
    rows = np.arange(15.0).reshape(5, 3)
    assert merge(rows).tolist() == [[3, 5, 7], [15, 17, 19], [12, 13, 14]]


def test_autocorrelated_pairs_widen_the_interval():
    """A slow drift is absorbed by blocks of many pairs, and would be missed by blocks of one."""
    rng, drift = np.random.default_rng(3), np.repeat([-1.0, 1.0] * 20, 100)
    rows = np.column_stack([np.ones(4000), 5 + drift + 0.1 * rng.standard_normal(4000), np.full(4000, 50.0)])
    noise = estimate(rows, source="x")
    alone = fieller(rows)
    assert noise.high - noise.low > 3 * (alone[1] - alone[0])


def feed(accumulator, start, stop):
    for i in range(start, stop):
        if i % 10 == 3:
            accumulator.skip()
        else:
            accumulator.update(40.0 + math.sin(i), 20.0 + math.cos(i), 8, 32)


def test_accumulator_in_constant_memory_keeps_every_pair():
    accumulator = NoiseAccumulator()
    feed(accumulator, 0, 5000)
    rows = accumulator.rows
    assert len(rows) <= RING
    expected = [pair(40 + math.sin(i), 20 + math.cos(i), 8, 32) for i in range(5000) if i % 10 != 3]
    assert rows.sum(axis=0) == pytest.approx([4500, *np.sum(expected, axis=0)], rel=1e-12)
    noise = accumulator.estimate()
    assert (noise.steps, noise.skipped, noise.small_batch, noise.large_batch) == (4500, 500, 8, 32)


@pytest.mark.parametrize("cut", [1, 255, 256, 257, 700])
def test_accumulator_goes_on_from_its_state(cut):
    whole, first, second = NoiseAccumulator(), NoiseAccumulator(), NoiseAccumulator()
    feed(whole, 0, 800)
    feed(first, 0, cut)
    second.load_state_dict(first.state_dict())
    feed(second, cut, 800)
    assert second.rows.tolist() == whole.rows.tolist()
    assert second.estimate() == whole.estimate()


def test_accumulator_refuses_and_skips():
    accumulator = NoiseAccumulator()
    for small, large in ((8, 8), (0, 8), (16, 8)):
        with pytest.raises(UsageError, match=f"n_small {small} and n_large {large}"):
            accumulator.update(1.0, 1.0, small, large)
    accumulator.update(math.nan, 1.0, 1, 2)
    assert (accumulator.skipped, accumulator.estimate().steps) == (1, 0)
    with pytest.raises(UsageError, match="lacks"):
        accumulator.load_state_dict({})


def test_zero_and_equal_gradients_are_no_number():
    zero = estimate(np.tile([1.0, 0.0, 0.0], (20, 1)), source="x")
    assert (zero.status, zero.b_simple) == ("unresolved", None)
    assert "every gradient was zero" in zero.notes[0].text
    rows = np.tile([1.0, 2.0, 1e-6], (20, 1))
    assert estimate(rows, source="x", small_batch=8).status == "unresolved"
    assert "equal within rounding" in estimate(rows, source="x", small_batch=8).notes[0].text
    assert estimate(rows, source="x", small_batch=1e-3).status == "resolved"  # not rounding at that size


def test_layers_are_judged_as_the_total_is():
    rows = np.stack([blocks(2.0, 10.0, 1.0), blocks(0.1, 10.0, 1.0), np.zeros((40, 3))])
    one, two, three = estimate_layers(["a", "b", "c"], rows, 8)
    total = estimate(rows[0], source="x", small_batch=8)
    assert (one.name, one.b_simple, one.low, one.high) == ("a", total.b_simple, total.low, total.high)
    assert (one.status, one.steps, one.reason) == ("resolved", 40, None)
    assert (two.status, two.b_simple, two.high) == ("lower_bound", None, None)
    assert two.low > 0
    assert (three.status, three.grad_sq, three.steps) == ("unresolved", None, 0)
    assert "the layer had no gradient" in three.reason
    with pytest.raises(UsageError, match="for 2 layers"):
        estimate_layers(["a", "b"], rows)


def test_accumulator_keeps_layers_and_preconditioned_norms_apart():
    """Layers that had no gradient in a step have no pair of it; all of it survives merging and its own state."""
    generator = np.random.default_rng(1)
    kept, other = (NoiseAccumulator("x", ("a", "b"), preconditioned=True) for _ in range(2))
    sums = {"a": np.zeros(3), "b": np.zeros(3), "p": np.zeros(3)}
    for step in range(700):
        norms = generator.gamma(100, 0.1, (4, 2)) + np.array([3.0, 0.0])
        norms[1] = math.nan if step % 7 == 0 else norms[1]
        kept.update(*norms[3], 8, 32, layers=norms[:2], preconditioned=norms[2])
        for name, row in zip(("a", "b", "p"), norms[:3], strict=True):
            if np.isfinite(row).all():
                sums[name] += [1.0, *pair(row[0], row[1], 8, 32)]
        if step == 300:
            other.load_state_dict(kept.state_dict())
            kept = other
    noise = kept.estimate()
    for layer in noise.layers:
        count, grad_sq, trace = sums[layer.name]
        assert layer.steps == count == (600 if layer.name == "b" else 700)
        assert [layer.grad_sq, layer.trace] == pytest.approx([grad_sq / count, trace / count])
    assert noise.preconditioned.trace == pytest.approx(sums["p"][2] / 700)
    with pytest.raises(UsageError, match=r"has shape \(64, 2, 3\) where \(64, 0, 3\)|has shape"):
        NoiseAccumulator("x").load_state_dict(kept.state_dict())
    with pytest.raises(UsageError, match=r"\(3, 2\) for 2 names"):
        kept.update(2.0, 1.0, 8, 32, layers=np.ones((3, 2)))


def test_only_steps_that_are_not_finite_are_said():
    accumulator = NoiseAccumulator()
    accumulator.update(math.nan, 1.0, 8, 16)
    assert "1 step had a gradient that is not finite" in accumulator.estimate().notes[0].text


def test_gradients_from_one_micro_batch_alone_are_said():
    """A layer used by one of two micro-batches: |g|^2 and |g / 2|^2, whose |G|^2 is exactly zero."""
    rows = [[1.0, *pair(x / 2, x / 4, 8.0, 16.0)] for x in (1.0, 2.0, 4.0) * 4]
    found = judge(np.array(rows))
    assert (found.status, found.value, found.grad_sq) == ("unresolved", None, 0.0)
    assert "one micro-batch of each step" in found.why


def test_pairs_go_on_at_steps_further_apart():
    """As if the pairs between had been left out one by one."""
    rng = np.random.default_rng(3)
    pairs = [(4.0 + noise, 1.0 + noise / 8) for noise in rng.exponential(2.0, 140)]
    close, far, whole = NoiseAccumulator(every=2), NoiseAccumulator(every=10), NoiseAccumulator(every=2)
    for small, large in pairs[:100]:
        close.update(small, large, 4, 32)
        whole.update(small, large, 4, 32)
    far.take_over(close)
    for small, large in pairs[100:]:
        far.update(small, large, 4, 32)
        whole.update(small, large, 4, 32)
        if small != pairs[-1][0]:
            whole._pass(4)
    assert far.newest() == whole.newest()
    assert far.estimate() == whole.estimate()
    assert far.newest().last_step == 200 + 10 * 39 + 2
