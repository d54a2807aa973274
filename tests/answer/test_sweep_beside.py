"""What a sweep that gives no critical batch says all the same: where its runs ended, and where they took fewest."""

import dataclasses

import numpy as np
import pytest
from cases.verdicts import BATCHES, capacity, noise, unaccounted

from pybatch.answer.best import best_of
from pybatch.answer.confidence import confidence_of
from pybatch.answer.critical import critical_of
from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError
from pybatch.fits.steps import fit_steps
from pybatch.fits.throughput import fit_throughput
from pybatch.records import Convergence, ConvergencePoint, Curve, RateSteps

SIZES = 2.0 ** np.arange(2, 11)  # 4 to 1,024


def swept(steps, cap=np.inf, rule="tuned", sizes=SIZES):
    """A sweep of three seeds, which scatter by 2 %; past the cap they did not reach."""
    table = np.round(
        np.asarray(steps)[:, None] * np.exp(0.02 * np.random.default_rng(0).standard_normal((len(sizes), 3)))
    )
    table[table > cap] = np.inf
    fit = fit_steps(sizes, table, cap=cap if np.isfinite(cap) else None, resamples=60)
    points = []
    for batch, row in zip(sizes, table, strict=True):
        steps = tuple(float(s) if np.isfinite(s) else None for s in row)
        status = tuple("reached" if s is not None else "not_reached" for s in steps)
        middle = float(np.median(row)) if np.isfinite(np.median(row)) else None
        rates = (RateSteps(0.1, steps, status),)
        state = "reached" if middle is not None else "not_reached"
        points.append(ConvergencePoint(int(batch), middle, state, 3, 0.1, reached=status.count("reached"), rates=rates))
    bend = (fit.s_min, fit.critical_batch, fit.low, fit.high)
    return Convergence((Curve(rule, "train", tuple(points), *bend, target=0.3, fit=fit, notes=fit.notes),))


def cut(largest=64, rule="tuned"):
    """Steps of a critical batch of 50 up to this batch size, and none past it."""
    return swept(np.where(largest < SIZES, 1e8, 200 * (1 + 50 / SIZES)), cap=20_000, rule=rule)


@pytest.mark.parametrize(("scale", "largest"), [(235, 64), (1000, 64), (10_000, 256)])
def test_no_batch_is_advised_past_those_that_reached(scale, largest):
    verdict = advise(capacity(), noise(scale), cut(largest))
    assert verdict.best_batch <= largest
    assert verdict.best_high <= largest
    assert verdict.confidence.level == "low"
    assert verdict.confidence.reasons[0] == f"runs past batch {largest} did not reach the target"
    assert not unaccounted(verdict)


def test_other_rules_and_sizes_beside_what_is_asked_bound_nothing():
    free = advise(capacity(), noise(1000)).best_batch
    assert advise(capacity(), noise(1000), cut(rule="linear")).best_batch == free
    small = advise(capacity(), noise(20), cut(256))
    assert "did not reach" not in small.text


def test_one_batch_size_in_the_middle_that_did_not_reach_bounds_nothing():
    steps = 200 * (1 + 50 / SIZES)
    sweep = swept(np.where(SIZES == 64, 1e8, steps), cap=20_000)
    assert "past batch" not in advise(capacity(), noise(1000), sweep).text


def test_a_sweep_that_was_made_is_not_said_to_be_missing():
    verdict = advise(capacity(), None, cut())
    assert "neither the noise scale nor" not in verdict.text
    assert "the sweep gives none" in verdict.text
    assert "were not measured" not in verdict.why("time_to_target").text
    assert "the sweep gives none" in verdict.why("critical_batch").text


def test_a_noise_scale_within_a_sweeps_bound_is_said_to_be_there():
    few = 2.0 ** np.arange(3, 8)
    verdict = advise(capacity(), noise(40, 32, 50), swept(1e5 / few, sizes=few))
    assert verdict.critical_low >= 120
    assert "by gradient noise within the sweep's bound" in verdict.text
    assert verdict.confidence.reasons[0] == "a noise scale within a sweep's bound"
    assert "the sweep gives a bound alone" in next(
        n.text for n in verdict.notes if n.figure == "verdict.critical_source"
    )


def timed(milliseconds):
    fit = fit_throughput(BATCHES, np.array(milliseconds) / 1e3, resamples=100)
    return capacity(fit, times=[float(t) for t in milliseconds])


def flat():
    return timed([20 * np.exp(0.003 * (-1) ** i) for i in range(len(BATCHES))])


def proportional():
    return timed([1.0 * b for b in BATCHES])


@pytest.mark.parametrize("batch", [32, 128])
def test_of_step_times_that_do_not_rise_the_fewest_steps_are_the_least_time(batch):
    device = flat()
    assert device.half_batch is None
    verdict = advise(device, None, swept(200 * (1 + (SIZES / batch) ** 1.5) * (1 + batch / SIZES)))
    assert verdict.best_low < batch < verdict.best_high
    assert verdict.best_high <= 4 * batch
    assert "where steps are fewest" in verdict.text
    assert "takes no longer" not in verdict.text
    # Of steps that fall throughout a larger batch takes no longer, as before.
    assert advise(device, None, swept(200 * (1 + 100 / SIZES))).best_high is None


@pytest.mark.parametrize("batch", [64, 128])
def test_of_times_in_proportion_the_fewest_examples_are_the_least_time(batch):
    device = proportional()
    assert device.half_batch is None
    verdict = advise(device, None, swept(200 * (1 + (1.25 * batch / SIZES) ** 1.7)))
    assert verdict.best_low < batch < verdict.best_high
    assert "where examples are fewest" in verdict.text
    assert "only costs examples" not in verdict.text
    # Of a hyperbola examples are fewest at the smallest batch, as before.
    assert advise(device, None, swept(200 * (1 + 100 / SIZES))).best_high == min(BATCHES)


def test_why_tells_the_confidence_and_where_the_critical_batch_is_from():
    verdict = advise(capacity(), noise(235))
    assert verdict.why("confidence").text == f"{verdict.confidence.level}: {'; '.join(verdict.confidence.reasons)}"
    assert verdict.why("critical_source") == verdict.why("critical_batch")


@pytest.mark.parametrize("device", [None, "flat", "whole"])
def test_why_tells_of_what_is_not_known_as_well(device):
    measured = {None: None, "flat": flat(), "whole": capacity()}[device]
    for scale in (None, noise(200), noise(None, 50, status="lower_bound")):
        verdict = advise(measured, scale)
        for name in ("confidence", "doubling", "second_device", "frontier", "critical_source", "evidence"):
            found = verdict.why(name)
            assert found.text
            if verdict.best_batch is None and name not in ("critical_source", "evidence"):
                assert found.text.startswith("not known: "), name
    with pytest.raises(UsageError, match="no figure 'colour' in this verdict"):
        verdict.why("colour")


def test_evidence_that_disagrees_is_told_without_a_capacity():
    bent = swept(200 * (1 + 50 / SIZES))
    found = advise(None, noise(5000), bent)
    assert found.because.startswith("The evidence disagrees on the critical batch: ")
    assert not advise(None, noise(60), bent).because.startswith("The evidence")
    assert "The evidence disagrees on" in advise(flat(), noise(5000), bent).text
    fixed = Convergence((dataclasses.replace(bent.curves[0], rule="linear"),))  # stands aside for nothing
    text = advise(None, noise(5000), fixed).text
    assert "both count" in text
    assert "advice" not in text  # none is given


def test_a_sweep_that_says_nothing_leaves_the_noise_scale_at_the_workloads_target():
    late = dataclasses.replace(noise(400), loss=0.15)
    aim = dataclasses.replace(capacity().workload, target={"train": 0.1})
    device = dataclasses.replace(capacity(), workload=aim)
    points = swept(200 * (1 + 50 / SIZES)).curves[0].points[:2]
    nothing = Convergence((Curve("tuned", "train", points, None, None, None, None, target=1.0),))
    alone = advise(device, late)
    assert advise(device, late, nothing).critical_batch == alone.critical_batch
    assert advise(device, late, nothing).best_batch == alone.best_batch


def test_steps_to_a_loss_far_above_the_workloads_target_are_told():
    aim = dataclasses.replace(capacity().workload, target={"train": 0.1})
    device = dataclasses.replace(capacity(), workload=aim)
    bent = swept(200 * (1 + 50 / SIZES))
    told = [n.text for n in advise(device, None, bent).notes if n.figure == "verdict.critical_source"]
    assert told == [
        "steps were measured to train loss 0.300, the workload's target is 0.100: "
        "up to there the critical batch grows. Sweep to that target"
    ]
    aim = dataclasses.replace(aim, target={"train": 0.27})
    near = advise(dataclasses.replace(device, workload=aim), None, bent)
    assert not any(n.figure == "verdict.critical_source" for n in near.notes)


def test_a_noise_scale_read_past_the_target_of_a_sweep_is_taken_back_without_a_capacity():
    bent = swept(200 * (1 + 50 / SIZES))  # to a train loss of 0.3
    early = dataclasses.replace(noise(400), loss=0.1)
    assert "disagrees" in advise(None, dataclasses.replace(early, loss=0.3), bent).text
    assert "disagrees" not in advise(None, early, bent).text


def test_a_sweep_whose_smallest_batches_cost_more_says_so():
    steep = swept(300 * (1 + (80 / SIZES) ** 2))
    [curve] = steep.curves
    fit = curve.fit
    steep = Convergence((dataclasses.replace(curve, b_min=fit.b_min, b_min_low=fit.b_min_low),))
    assert advise(None, None, steep).because.startswith(
        f"Examples are fewest at batch {fit.b_min:.0f}: smaller ones take more steps and more examples;"
    )


def test_a_batch_that_was_timed_and_is_surely_faster_is_taken():
    """Not only twice or half of the batch that the smoothed times would have."""
    sweep = swept(200 * (1 + 100 / SIZES))
    plain = [2.0 * (1 + b / 60) for b in BATCHES]
    dip = [t * (0.4 if b == 256 else 1.0) for b, t in zip(BATCHES, plain, strict=True)]
    assert advise(timed(dip), None, sweep).best_batch == 256
    assert advise(timed(plain), None, sweep).best_batch in range(50, 120)


@pytest.mark.parametrize(("tail", "told"), [(1.104, False), (1.106, True)])
def test_regret_that_is_told_as_the_threshold_is_no_reason(tail, told):
    critical = critical_of(noise(235), None)
    best = dataclasses.replace(best_of(critical, capacity(), None), regret=(1.0, tail))
    assert any("times the least time" in text for text in confidence_of(critical, best, capacity()).reasons) == told
