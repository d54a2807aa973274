"""The verdict: what it advises is what brute force finds, and every number it prints can be accounted for."""

import dataclasses
import math
import re

import numpy as np
import pytest
from cases.verdicts import BATCHES, BRANCHES, capacity, exact, noise, numbers_in, throughput, unaccounted

from pybatch.answer import rate
from pybatch.answer.ensemble import EFFICIENCY
from pybatch.answer.verdict import advise, ensemble
from pybatch.base.errors import UsageError
from pybatch.fits.throughput import fit_throughput
from pybatch.records import (
    Capacity,
    Convergence,
    ConvergencePoint,
    Curve,
    Note,
    StepsFit,
)


def sweep(critical=200.0, s_min=500.0, seeds_differ_by=0.02):
    points = tuple(ConvergencePoint(b, s_min * (1 + critical / b), "reached", 3, 0.1, reached=3) for b in BATCHES)
    fit = StepsFit(
        "hyperbola", s_min, critical, critical / 1.2, critical * 1.2, 0.2 * critical, critical, 4 * critical,
        parameters={"s_min": s_min, "b_c": critical}, rms_log_error=seeds_differ_by)  # fmt: skip
    good = Curve("tuned", "train", points, s_min, critical, critical / 1.2, critical * 1.2, target=0.3, fit=fit)
    other = Curve("constant", "train", points, 2 * s_min, 2 * critical, critical, 3 * critical, target=0.3)
    unfitted = Curve("tuned", "test", (), None, None, None, None)
    return Convergence((unfitted, other, good))


TABLE = {
    # name: (capacity, noise, steps) -> (limit, what the best batch is within, what the text must say)
    "noise": ((capacity(), noise(4)), ("noise", (10, 16), "Gradient noise sets the limit")),
    "hardware": ((capacity(), noise(12_000)), ("hardware", (512, 1024), "The device sets the limit")),
    "balanced": ((capacity(), noise(40)), ("balanced", (32, 48), "Time is steps times step time")),
    "memory": ((capacity(max_batch=50), noise(12_000)), ("hardware", (48, 48), "Memory ends at batch 50")),
    "data set": ((capacity(examples=100), noise(12_000)), ("hardware", (100, 100), "Use batch 100,")),
    "no noise at all": ((capacity(), noise(0.0, 0.0, 3.0)), ("noise", (1, 4), "at batch 0 (0 to 12,")),
    "lower bound above": (
        (capacity(), noise(None, 900, status="lower_bound")),
        ("hardware", None, "above the device's half batch"),
    ),
    "lower bound below": (
        (capacity(), noise(None, 30, status="lower_bound")),
        ("unresolved", None, "not known yet; it is at least"),
    ),
    "unresolved": (
        (capacity(), noise(None, status="unresolved")),
        ("unresolved", None, "No batch can be advised yet. The critical batch is not known: |G|^2 is not separated"),
    ),
    "capacity alone": ((capacity(), None), ("unresolved", None, "Measure the noise scale as well")),
    "noise alone": ((None, noise(40)), ("unresolved", None, "Capacity was not measured")),
    "lower bound alone": ((None, noise(None, 90, status="lower_bound")), ("unresolved", None, "at least 90")),
    "nothing": ((None, None), ("unresolved", None, "No batch can be advised")),
    "sweep": ((capacity(), None, sweep()), ("hardware", (80, 96), "by measured steps")),
    "disagreement": (
        (capacity(), noise(12_000), sweep()),
        ("hardware", (80, 96), "disagrees on the critical batch: the "),
    ),
    "floor": ((capacity(throughput(alpha=1e-4, floor=0.008)), noise(40)), ("balanced", (32, 48), "Use batch 40,")),
    "disturbed": (
        (capacity(dataclasses.replace(throughput(), rms_log_error=0.52)), noise(None, 90, status="lower_bound")),
        ("hardware", None, "by 52 %"),
    ),
    "three batches": (
        (Capacity(None, None, None, None, None, None, None, None, None, None), noise(40)),
        ("unresolved", None, "Too few batch sizes"),
    ),
}


@pytest.fixture(params=TABLE)
def case(request):
    inputs, expected = TABLE[request.param]
    return advise(*inputs), expected


def test_advice(case):
    verdict, (limit, best, says) = case
    assert verdict.limit == limit
    assert says in verdict.text
    assert verdict.text.startswith((verdict.answer, "Measure again"))
    assert verdict.because in verdict.text
    assert verdict.text.count(". ") <= 6
    assert (verdict.best_batch is None) == (best is None) == (verdict.confidence is None)
    if best is not None:
        assert best[0] <= verdict.best_batch <= best[1]
        assert verdict.best_low <= verdict.best_batch <= verdict.best_high
        assert verdict.useful_devices_low <= verdict.useful_devices <= verdict.useful_devices_high
        assert f"Confidence: {verdict.confidence.level} (" in verdict.answer


def test_every_missing_figure_has_a_note_and_every_given_one_a_reason(case):
    verdict, _ = case
    reasons = {r.figure for r in verdict.reasons}
    for figure in ("critical_batch", "saturation_batch", "best_batch", "useful_devices", "time_to_target"):
        if getattr(verdict, figure) is None:
            assert any(n.figure == f"verdict.{figure}" and len(n.text) > 10 for n in verdict.notes), figure
        else:
            assert figure in reasons, figure
    assert "limit" in reasons


def test_every_number_in_the_text_can_be_accounted_for(case):
    """It stands in a field of the verdict, or among a reason's inputs, rounded as numerals rounds."""
    assert unaccounted(case[0]) == set()


def test_an_unaccounted_number_would_be_caught():
    assert numbers_in("Use batch 64 (95 % interval 1,200 to 3.5, x), |G|^2") == ["64", "1,200", "3.5"]


def test_why():
    verdict = advise(capacity(), noise(40))
    reason = verdict.why("best_batch")
    assert reason.inputs["optimum"] == pytest.approx(math.sqrt(40 * 40), rel=0.1)
    assert verdict.why("critical_batch").evidence == "modelled"  # B_simple is measured; that it is critical, is not
    assert "steps to a target were not measured" in verdict.why("time_to_target").text
    with pytest.raises(UsageError, match="no figure 'colour'"):
        verdict.why("colour")
    assert advise(capacity(), noise(1000)).why("devices").figure == "useful_devices"  # the one that has this word
    with pytest.raises(UsageError, match="no figure 'batch'"):
        advise(capacity(), noise(1000)).why("batch")


FITS = {"affine": throughput(), "floor": throughput(alpha=0.002, floor=0.008), "knee": throughput(1e-5, floor=0.008)}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("critical", [3.0, 200.0, 5e4])
@pytest.mark.parametrize("most", [math.inf, 64.0])
def test_optimum_is_the_least_time(name, critical, most):
    """Against 20 000 batches tried one by one."""
    model = exact(FITS[name], critical, most)
    grid = np.geomspace(1, min(most, 1e6), 20_000)
    time = [(1 + critical / b) * FITS[name].step_s(b) for b in grid]
    assert model.time(model.optimum()) <= min(time) * (1 + 1.5e-3)  # the grid's step, at a knee
    assert model.optimum() == pytest.approx(grid[np.argmin(time)], rel=2e-3)


@pytest.mark.parametrize("critical", [40.0, 5e3, 9e4])
def test_useful_devices_by_brute_force(critical):
    """T(1) / (K T(K)) with every batch tried, and against the closed form for the affine model."""
    fit = throughput()
    grid = np.geomspace(1, 1e7, 40_001)

    def least(k):
        return np.min((1 + critical / grid) * (fit.alpha_s + fit.beta_s * grid / k))

    found, low, high = exact(fit, critical).useful_devices()
    assert found / 1.1 <= low <= found == high  # nothing is unknown, but ends are looked at in steps of 10 %
    assert least(1) / (found * least(found)) >= EFFICIENCY * (1 - 1e-6)
    assert least(1) / ((found + 1) * least(found + 1)) < EFFICIENCY
    ratio = math.sqrt(critical / fit.half_batch)
    assert found == math.floor((1 + (1 + ratio) * (1 / math.sqrt(EFFICIENCY) - 1)) ** 2)


def test_more_devices_are_worth_it_where_memory_binds():
    """One device of little memory is slow; each further one brings memory as well."""
    assert exact(throughput(), 5e3, 16.0).useful_devices() > exact(throughput(), 5e3).useful_devices()


def test_cost_of_going_further_is_the_ratio_of_times():
    """With steps measured at every batch size the ensemble is as good as the truth."""
    verdict = advise(capacity(), None, sweep())
    inputs, fit, best = verdict.why("limit").inputs, throughput(), verdict.best_batch
    examples = (380 + 200) / (best + 200)
    speed = 380 / fit.step_s(380) / (best / fit.step_s(best))
    assert inputs["examples_factor"] == pytest.approx(examples, rel=0.02)
    assert inputs["throughput_factor"] == pytest.approx(speed, rel=0.02)
    assert inputs["time_factor"] == pytest.approx(examples / speed, rel=0.02)
    assert inputs["time_factor_low"] < inputs["time_factor"] < inputs["time_factor_high"]


@pytest.mark.parametrize("where", ["S", "t"])
def test_members_agree_where_it_was_measured_and_part_elsewhere(where):
    found = ensemble(capacity(batches=BATCHES[::3]), None, sweep(seeds_differ_by=0.01))
    curve = found.step_s if where == "t" else found.steps
    at, between = (np.log(curve(b, members=True)).std() for b in (64, 180))
    beyond = np.log(curve(1e6, members=True)).std()
    assert at < 0.015
    assert between > (1.3 * at if where == "t" else 0)
    assert beyond > 2 * at
    truth = throughput().step_s(180) if where == "t" else 500 * (1 + 200 / 180)
    assert curve(180) == pytest.approx(truth, rel=0.02)


def test_a_step_time_that_was_measured_overrules_a_model_that_misses_it():
    """A cache cliff at 64 that no affine fit can follow: a batch below it is faster to the loss."""
    times = [1e3 * throughput().step_s(b) * (2.0 if b >= 64 else 1.0) for b in BATCHES]
    assert advise(capacity(), None, sweep()).best_batch >= 64
    cliff = advise(capacity(fit_throughput(BATCHES, [t / 1e3 for t in times]), times=times), None, sweep())
    assert 32 <= cliff.best_batch < 64
    assert cliff.best_low <= 32


def test_a_noisy_time_moves_the_advice_little():
    """Of many batches timed with 15 % error some looks faster by chance: that is no evidence."""
    rng, found = np.random.default_rng(5), []
    for _ in range(25):
        drawn = [1e3 * throughput().step_s(b) * math.exp(0.15 * rng.standard_normal()) for b in BATCHES]
        fit = fit_throughput(BATCHES, [t / 1e3 for t in drawn], resamples=20)
        found.append(advise(capacity(fit, times=drawn, error=0.3), None, sweep()).best_batch)
    truth = math.sqrt(200 * 40)
    assert np.mean(np.abs(np.log2(np.array(found) / truth))) < 0.6
    regret = [(1 + 200 / b) * throughput().step_s(b) / ((1 + 200 / truth) * throughput().step_s(truth)) for b in found]
    assert np.mean(regret) < 1.05


def test_a_bound_is_used_up_and_never_said_to_be_worse():
    for most in (9, 50, 63):
        verdict = advise(capacity(max_batch=most), noise(1e5))
        assert verdict.best_batch == most - most % 8
        assert "examples per second" not in verdict.text
    found = advise(capacity(max_batch=50), noise(None, 5e4, status="lower_bound"))
    assert "Use batch 50, the largest that memory allows" in found.text
    found = advise(capacity(examples=60), noise(None, 5e4, status="lower_bound"))
    assert "Use batch 60, the largest that the data set allows" in found.text


def test_a_smaller_data_set_never_makes_more_devices_worth_it():
    free = advise(capacity(), noise(1e5)).useful_devices
    found = [advise(capacity(examples=n), noise(1e5)).useful_devices for n in (100, 1000, 10_000)]
    assert found == sorted(found)
    assert found[-1] <= free


def test_an_open_interval_of_the_device_opens_the_optimums():
    fit = dataclasses.replace(throughput(), ceiling_high=None, half_high=None, saturation_high=None, half_low=0.0)
    verdict = advise(capacity(fit, max_batch=None), noise(1000))
    assert verdict.best_high is None
    assert " or more. " in verdict.answer
    assert verdict.limit == "unresolved"  # an open end may lie on either side of the critical batch


def test_odd_batches_measured_are_candidates():
    batches = (1, 10, 30, 87, 150, 400)
    assert advise(capacity(batches=batches), None, sweep()).best_batch == 87
    verdict = advise(capacity(batches=(1, 2, 4)), noise(100))
    assert verdict.best_batch >= 48
    assert "past the largest timed" in verdict.answer


def test_time_to_target_needs_steps():
    assert advise(capacity(), noise(200)).time_to_target is None
    verdict = advise(capacity(), noise(300), sweep(200.0, 500.0))
    steps = 500 * (1 + 200 / verdict.best_batch)
    assert verdict.time_to_target == pytest.approx(steps * throughput().step_s(verdict.best_batch), rel=0.02)
    assert verdict.critical_source == "sweep"
    assert verdict.critical_batch == pytest.approx(205, abs=5)  # a noise scale moves a measured one little


def test_misfit_is_told():
    poor = dataclasses.replace(throughput(), rms_log_error=0.17)
    verdict = advise(capacity(poor), noise(40))
    assert any("17 % (rms)" in n.text for n in verdict.notes)
    assert verdict.text.startswith("Use batch")
    assert verdict.confidence.level != "high"
    useless = advise(capacity(dataclasses.replace(poor, rms_log_error=1.3)), noise(40))
    assert "Confidence: low (measure again: step times miss any smooth curve by 130 %" in useless.answer
    useless = advise(capacity(dataclasses.replace(poor, rms_log_error=1.3)), None)
    assert useless.text.startswith("Measure again before trusting this: step times miss any smooth curve by 130 %")


def test_extrapolation_is_told():
    assert "saturation batch by extrapolation" in advise(capacity(batches=(1, 4, 16, 64)), noise(4)).text
    assert "extrapolat" not in advise(capacity(), noise(4)).text


def test_an_open_end_of_the_critical_batch_opens_the_optimums():
    """A sweep that bends little: the critical batch may lie far above, or a single seed gave no interval at all."""
    for low, high in ((160.0, None), (None, 250.0), (None, None)):
        curve = dataclasses.replace(sweep().curves[-1], low=low, high=high)
        found = advise(capacity(), None, Convergence((curve,)))
        assert found.critical_batch == 200.0
        assert found.best_low < found.best_batch
        if low is None:
            assert found.best_low == 1
        if high is None:
            assert found.best_high is None
            assert f"{found.best_low} or more. " in found.answer
        else:
            assert found.best_high < 200
        assert found.limit == ("hardware" if low is not None else "unresolved")
        assert unaccounted(found) == set()
    assert "200 (interval not known, by measured steps)" in found.text


def test_a_bound_of_the_tuned_rates_goes_before_the_value_of_a_fixed_rule():
    tuned = Curve("tuned", "train", (), None, None, 4096.0, None, target=0.3)
    other = dataclasses.replace(sweep().curves[-1], rule="constant")
    found = advise(capacity(), None, Convergence((other, tuned)))
    assert (found.critical_batch, found.critical_low) == (None, 4096.0)
    assert found.limit == "hardware"
    test = dataclasses.replace(sweep().curves[-1], split="test")
    assert advise(capacity(), None, Convergence((other, tuned, test))).critical_batch == 200.0
    assert advise(capacity(), None, Convergence((other,))).critical_batch == 200.0


@pytest.mark.parametrize(
    ("times", "says", "low", "high"),
    [
        (
            [10.0] * len(BATCHES),
            "The best batch is not known yet; it is at least 4,096. Step times do not rise with the batch",
            4096,
            None,
        ),
        ([1.0 * b for b in BATCHES], "Use batch 1. Step time is proportional to the batch", None, 1),
    ],
)
def test_times_without_a_half_batch_bound_the_best_batch(times, says, low, high):
    """No figure of the fit's search reaches the advice: what was timed bounds it."""
    measured = capacity(fit_throughput(BATCHES, [t / 1e3 for t in times]), times=times)
    verdict = advise(measured, noise(200))
    assert verdict.text.startswith(says)
    assert "200 (50 to 803, by gradient noise)" in verdict.text
    assert (verdict.best_batch, verdict.best_low, verdict.best_high) == (None, low, high)
    assert verdict.saturation_batch is None
    assert unaccounted(verdict) == set()


def test_a_disturbed_machine_is_believed_less():
    """Wider, not the same advice with a note."""
    quiet = advise(capacity(), None, sweep())
    scatter = np.exp(0.1 * np.random.default_rng(3).standard_normal(len(BATCHES)))
    times = [float(1e3 * throughput().step_s(b) * e) for b, e in zip(BATCHES, scatter, strict=True)]
    fit = fit_throughput(BATCHES, [t / 1e3 for t in times], resamples=50)
    disturbed = dataclasses.replace(capacity(fit, times=times), disturbed=("other processes kept 1.9 of 2 cores busy",))
    found = advise(disturbed, None, sweep())
    assert quiet.confidence.level == "high"
    assert found.confidence.level == "low"
    assert "machine disturbed: other processes kept 1.9 of 2 cores busy" in found.answer
    assert found.best_high / found.best_low > 1.3 * quiet.best_high / quiet.best_low


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((Capacity,), "capacity is the class Capacity. Give a Capacity, such as a run's .capacity"),
        ((None, capacity()), "noise is Capacity. Give a NoiseScale"),
        ((None, None, 3.5), "steps is float. Give a Convergence, such as a run's .convergence"),
    ],
)
def test_what_is_no_record_is_refused(given, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        advise(*given)


def test_the_learning_rate_there():
    """Tuned where it was; else by the optimizer's rule from the nearest known one, and said to be a rule."""
    swept = advise(capacity(), None, sweep())
    nearest = min(BATCHES, key=lambda b: abs(math.log(b / swept.best_batch)))
    assert swept.learning_rate == pytest.approx(0.1 * math.sqrt(swept.best_batch / nearest))
    for name in ("sgd", "SGD"):
        at = dataclasses.replace(sweep(), optimizer=name)
        assert advise(capacity(), None, at).learning_rate == pytest.approx(0.1 * swept.best_batch / nearest)
    known = capacity()
    work = dataclasses.replace(known.workload, learning_rate=0.01, reference_batch=32)
    found = advise(dataclasses.replace(known, workload=work), noise(400))
    assert found.learning_rate == pytest.approx(0.01 * math.sqrt(found.best_batch / 32))
    assert "a rule of thumb for optimizers like Adam, not measured" in found.why("learning_rate").text
    assert advise(capacity(), noise(40)).learning_rate is None
    assert "no rate is known" in advise(capacity(), noise(40)).why("learning_rate").text


@pytest.mark.parametrize(
    ("base", "batch", "factor", "rule"),
    [
        (32, 128, 4.0, "linear"),
        (32, 200, 6.25, "linear"),
        (32, 800, 6.25 * 2, "linear, then sqrt"),
        (800, 32, 1 / 12.5, "linear, then sqrt"),
        (400, 1600, 2.0, "sqrt"),
        (128, 32, 0.25, "linear"),
    ],
)
def test_a_rate_of_sgd_grows_without_a_jump_at_the_critical_batch(base, batch, factor, rule):
    """In proportion up to batch 200, then by the root of the ratio; Adam's by the root throughout."""
    assert rate._scaled("sgd", base, batch, 200.0) == (pytest.approx(factor), rule)
    assert rate._scaled("adamw", base, batch, 200.0) == (pytest.approx(math.sqrt(batch / base)), "sqrt")
    near = [rate._scaled("sgd", base, at, 200.0)[0] for at in (199, 201)]
    assert near[1] / near[0] == pytest.approx(1, abs=0.02)


def test_a_noise_scale_read_past_the_target_is_taken_back_to_it():
    """It grows as the loss falls: at a quarter of the target's loss it is twice what it was there, about."""
    known = capacity()
    work = dataclasses.replace(known.workload, target={"train": 0.4})
    known = dataclasses.replace(known, workload=work)
    early, late = (advise(known, dataclasses.replace(noise(200), loss=loss)) for loss in (0.5, 0.1))
    assert early.critical_batch == 200.0
    assert late.critical_batch == pytest.approx(100.0)
    assert late.critical_high / late.critical_low > 3 * early.critical_high / early.critical_low
    assert late.best_batch < early.best_batch
    assert "read at train loss 0.100, past the target" in late.why("critical_batch").text
    said = next(note.text for note in late.notes if note.figure == "critical_batch")
    assert said.startswith("the noise scale, read past the target loss, counts as 100, as at the target")
    assert not any("past the target" in note.text for note in early.notes)


def test_branches_that_begin_past_the_target_stand_for_less():
    """Of several checkpoints the last up to the target counts, and of none the first, taken back."""
    known = capacity()
    known = dataclasses.replace(known, workload=dataclasses.replace(known.workload, target={"train": 0.4}))

    def at(loss, critical=200.0):
        found = BRANCHES["fitted"][0]
        fit = dataclasses.replace(found.fit, critical_batch=critical, low=0.9 * critical, high=1.1 * critical)
        return dataclasses.replace(found, loss=loss, fit=fit, tuned=True)

    def advised(*branches):
        return advise(known, None, Convergence((), branches=branches))

    early, late, both, past = (
        advised(*found) for found in ((at(0.5),), (at(0.1),), (at(0.5), at(0.1, 900.0)), (at(0.1), at(0.05, 900.0)))
    )
    assert early.critical_batch == both.critical_batch == 200.0
    assert [e.kind for e in early.evidence] == ["tuned branch"]
    assert late.critical_batch == past.critical_batch == pytest.approx(100.0)
    assert [(e.kind, e.factor) for e in late.evidence] == [("branch past target", 8.0)]
    assert late.critical_high / late.critical_low > 3 * early.critical_high / early.critical_low
    assert "begin at train loss 0.100, past the target, and are taken back" in late.why("critical_batch").text
    bound = at(0.1)
    bound = dataclasses.replace(bound, fit=dataclasses.replace(bound.fit, critical_batch=None, high=None))
    open_ = advised(bound)
    assert (open_.critical_batch, open_.critical_low) == (None, 180.0)
    assert open_.why("critical_batch").text.endswith("past the target")
    assert "past the target" not in early.why("critical_batch").text


def test_branches_alone_say_which_checkpoint_the_answer_is_of():
    """The headline was 5.0, the table's rows were 12.2 and 42.0, and no word said how they belong together."""

    def at(step, loss, critical, high=300.0, level=0.4):
        found = BRANCHES["fitted"][0]
        fit = dataclasses.replace(found.fit, critical_batch=critical, low=None, high=high)
        return dataclasses.replace(found, step=step, loss=loss, level=level, fit=fit, tuned=True)

    def because(*branches, aimed=True):
        return advise(None, None, Convergence((), branches=branches, target=0.4 if aimed else None)).because

    early, late, latest = at(20, 0.5, 60.0), at(60, 0.1, 900.0), at(1200, 0.05, 2000.0)
    assert "reading is of step" not in because(early)
    short = "The branches' reading is of step 20: its steps are to loss 0.600, as branches were not soon enough at the "
    assert because(at(20, 0.9, 60.0, level=0.6)).startswith(f"{short}target of 0.400. Far below")
    last = "The branches' reading is of step 20, the last checkpoint up to the target. Far below"
    assert because(early, late).startswith(last)
    assert because(early, late, aimed=False).startswith(
        "The branches' reading is of step 60, the last checkpoint. Far below"
    )
    said = (
        "The branches' reading is of step 60, where it is 900: they begin at loss 0.100, past the target of 0.400, and "
    )
    assert because(late, latest).startswith(f"{said}it is taken back to it. Far below")
    assert because(late).startswith(f"{said}it is taken back to it. Far below")
    bound = dataclasses.replace(late, fit=dataclasses.replace(late.fit, critical_batch=None, low=800.0, high=None))
    for one in (bound, at(60, -0.5, 900.0)):
        text = because(one)
        assert "The branches' reading is of step 60: they begin at loss" in text
        assert "past the target of 0.400. Far below" in text
        assert "taken back" not in text


def test_a_bound_of_a_fixed_rule_overrules_nothing():
    """At a rate that fails steps do not fall with the batch: that is no evidence against a noise scale."""
    failed = Curve("constant", "train", (), None, None, None, 4.0, target=0.3)
    assert advise(capacity(), noise(1000), Convergence((failed,))).critical_batch == 1000.0
    assert advise(capacity(), None, Convergence((failed,))).critical_high == 4.0
    tuned = dataclasses.replace(failed, rule="tuned", low=4096.0, high=None)
    found = advise(capacity(), noise(200), Convergence((tuned,)))
    assert found.critical_low == 4096.0
    assert "the sweep at least 4,100 and the noise scale 200; the sweep stands" in found.text
    assert [reading.kind for reading in found.evidence] == ["noise"]


def test_branches_are_no_curve_of_a_sweep():
    """Steps to a bound's target and steps of a branch's window are of different levels."""
    branch = dataclasses.replace(BRANCHES["fitted"][0], tuned=True)
    fit = dataclasses.replace(branch.fit, parameters={"s_min": 100.0, "b_c": 600.0})
    branch = dataclasses.replace(branch, fit=fit)
    points = tuple(ConvergencePoint(b, 5e5 / b, "reached", 3, 0.1, reached=3) for b in BATCHES if b <= 512)
    bound = Curve("tuned", "train", points, None, None, 512.0, None, target=0.3)
    loose = dataclasses.replace(bound, low=64.0)  # below what branches leave possible: it changes nothing
    alone, both, free = (advise(capacity(), None, Convergence(c, branches=(branch,))) for c in ((), (bound,), (loose,)))
    assert free.best_batch == alone.best_batch < both.best_batch < 2 * alone.best_batch
    assert both.critical_low >= 512 > alone.critical_low
    assert both.best_high / both.best_low < 1.2 * alone.best_high / alone.best_low
    assert both.time_to_target is None


@pytest.mark.parametrize("least", [1, 256])
def test_advice_below_the_smallest_timed_is_said(least):
    batches = tuple(b for b in BATCHES if b >= least)
    found = advise(capacity(batches=batches), None, sweep(critical=1.0))
    assert ("below the smallest timed" in found.answer) == (least == 256)
    assert (found.confidence.level == "high") == (least == 1)


def test_scattered_times_without_a_trend_advise_nothing():
    """No trend is seen for the scatter: that is no proof that larger batches take no longer."""
    times = [1.34, 4.43, 7.74, 5.84, 6.14, 6.37, 5.27, 5.35, 5.61, 6.70]
    fit = fit_throughput(BATCHES[:10], [t / 1e3 for t in times])
    found = advise(capacity(fit, batches=BATCHES[:10], times=times), noise(200))
    if fit.half_batch is None:
        assert "Step times scatter by 47 % and show no trend" in found.text
    assert found.best_batch is None or found.confidence.level == "low"


@pytest.mark.parametrize(
    "seconds",
    [lambda b: 0.01 * b**1.08, lambda b: 0.01 * b**1.15, lambda b: 0.01 * b * (1.8 if b > 32 else 1.0)],
)
def test_times_that_rise_faster_than_the_batch_are_no_scatter(seconds):
    """They rose 900-fold, and "step times scatter by 34 % and show no trend"."""
    sizes = BATCHES[:11]
    times = [seconds(b) for b in sizes]
    fit = fit_throughput(sizes, times)
    assert any("rises about in proportion to, or faster than, the batch" in note.text for note in fit.notes)
    assert any("off the curve" in note.text for note in fit.notes)
    rates = [b / t for b, t in zip(sizes, times, strict=True)]
    assert fit.ceiling_low <= (1 + 1e-9) * min(rates) < (1 - 1e-9) * max(rates) <= fit.ceiling_high
    found = advise(capacity(fit, batches=sizes, times=[1e3 * t for t in times]), noise(200))
    assert "Use batch 1. Step time rises about in proportion to, or faster than, the batch" in found.text
    assert "no trend" not in str(found.notes) + found.text


def test_remedies_can_be_followed():
    """No batch is to be tried that the data set or memory does not allow."""
    assert "half batch 50" in advise(capacity(examples=50), noise(2000)).text
    assert "Before a long run" not in advise(capacity(examples=1), noise(2000)).text
    flat = dataclasses.replace(throughput(), half_batch=None, saturation_batch=None, alpha_s=0.0, t0_s=0.0)
    small = capacity(flat, max_batch=1, batches=(8, 16, 32, 64), times=[8.0, 16.0, 32.0, 64.0])
    assert advise(small, noise(200)).text.startswith("Use batch 1.")


@pytest.mark.parametrize("ends", [(1.0, 1.0), (1.0, 1.2), (0.8, 1.0)])
def test_an_interval_that_is_a_point_is_not_believed(ends):
    """A bootstrap whose draws agree to the last digit; alone, and beside a noise scale that says otherwise."""
    steps = sweep()
    [curve] = [c for c in steps.curves if c.rule == "tuned" and c.fit is not None]
    low, high = (end * curve.critical_batch for end in ends)
    fit = dataclasses.replace(curve.fit, low=low, high=high)
    steps = dataclasses.replace(steps, curves=(dataclasses.replace(curve, low=low, high=high, fit=fit),))
    for scale in (None, noise(4)):
        verdict = advise(capacity(), scale, steps)
        assert verdict.critical_batch == pytest.approx(curve.critical_batch)
        assert verdict.best_low <= verdict.best_batch <= verdict.best_high


def test_advice_is_not_open_upwards_where_throughput_falls():
    """Step times that do not rise to 16, and jump a hundredfold past it, as where a cache overflows."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 256)
    times = [0.486] * 5 + [47.9, 49.0, 51.5]
    flat = fit_throughput(sizes[:5], [[1e-3 * t] * 9 for t in times[:5]])
    assert flat.half_batch is None
    verdict = advise(dataclasses.replace(capacity(batches=sizes, times=times), model=flat), noise(40))
    assert verdict.answer.startswith("Use batch 16.")
    assert "past batch 16 fewer examples are done a second" in verdict.because
    assert (verdict.best_low, verdict.best_high) == (16, 16)


def said_of_the_rate(rate, batch=BATCHES[2], optimizers=("adamw", "adamw")):
    """Of a noise scale read at this rate, beside a sweep whose rate is 0.1 at each batch size."""
    known, (own, swept) = capacity(), optimizers
    work = dataclasses.replace(known.workload, learning_rate=rate, reference_batch=batch, optimizer=own)
    known, read = dataclasses.replace(known, workload=work), dataclasses.replace(noise(400), learning_rate=rate)
    steps = dataclasses.replace(sweep(), optimizer=swept)
    found, alone = advise(known, read, steps), advise(known, None, steps)
    texts = [note.text for note in found.notes if note.figure == "noise.b_simple"]
    assert (found.critical_batch == alone.critical_batch) == (len(texts) > 0)
    return texts


def test_a_noise_scale_of_another_rate_stands_where_the_search_says_nothing_of_the_critical_batch():
    known = capacity()
    work = dataclasses.replace(known.workload, learning_rate=0.01, reference_batch=4, optimizer="adamw")
    read = dataclasses.replace(noise(400), learning_rate=0.01)
    few = ConvergencePoint(4, 500.0, "reached", 3, 0.1, reached=3)
    steps = Convergence((Curve("tuned", "train", (few,), None, None, None, None, target=0.3),), optimizer="adamw")
    found = advise(dataclasses.replace(known, workload=work), read, steps)
    assert found.critical_batch is not None
    (text,) = (note.text for note in found.notes if note.figure == "noise.b_simple")
    assert "10 times below" in text
    assert "left out" not in text


def test_a_rate_of_another_optimizer_or_far_from_the_batches_swept_is_no_measure():
    assert said_of_the_rate(0.01)
    assert said_of_the_rate(0.01, optimizers=("adamw", "sgd")) == []
    assert said_of_the_rate(0.01, optimizers=("adamw", None)) == []
    assert said_of_the_rate(0.001, batch=4 * BATCHES[-1]) == []
    assert said_of_the_rate(0.001, batch=2 * BATCHES[-1])


def test_the_rule_of_the_optimizer_carries_a_rate_to_the_batch_of_the_noise_scale():
    """From batch 4 to 3, 0.1 becomes 0.0866 by Adam's root of the ratio, and 0.075 by SGD's ratio."""
    assert "4.33 times below" in said_of_the_rate(0.02, 3)[0]
    assert said_of_the_rate(0.02, 3, ("sgd", "sgd")) == []


@pytest.mark.parametrize(
    ("rate", "said"), [(0.01, "10 times below"), (1.0, "10 times above"), (0.06, None), (0.3, None), (None, None)]
)
def test_a_noise_scale_of_a_rate_far_from_the_tuned_one_is_said_to_be(rate, said):
    texts = said_of_the_rate(rate)
    if said is None:
        assert texts == []
    else:
        (text,) = texts
        assert f"{said} what a search found best, 0.1 at batch {BATCHES[2]}" in text


def test_a_second_device_that_saves_next_to_nothing_is_told_without_figures():
    still, grown = advise(capacity(), noise(0.0, 0.0, 3.0)), advise(capacity(), noise(40))
    assert still.why("second_device").inputs["time_factor"] > 0.95
    assert "A second device would save next to no time, modelled" in still.text
    assert "next to no time" not in grown.text


@pytest.mark.parametrize("scale", [noise(40), None])
def test_runs_without_a_critical_batch_come_first_and_a_noise_scale_after_them(scale):
    """A sweep in which nothing reached the target led with the noise scale's figure, as if it had measured that."""
    notes = (Note("points", "no batch size reached the target in half of its seeds. Give a higher target"),)
    nothing = Convergence((Curve("tuned", "train", (), None, None, None, None, notes=notes),), 3)
    found = advise(None, scale, nothing)
    assert found.answer == "The critical batch cannot be told from these runs."
    assert found.because == "No batch size reached the target in half of its seeds. Give a higher target."
    instead = "By other evidence it is 40 (10 to 161, by gradient noise), which these runs do not confirm."
    assert (instead in found.text) == (scale is not None)
    assert advise(None, scale, sweep()).answer.startswith("The critical batch is ")
    empty = dataclasses.replace(nothing, curves=(dataclasses.replace(nothing.curves[0], notes=(Note("points", ""),)),))
    assert advise(None, scale, empty).answer == "The critical batch cannot be told from these runs."
    branched = dataclasses.replace(nothing, branches=(BRANCHES["fitted"][0],))
    assert advise(None, scale, branched).answer.startswith("The critical batch is ")


@pytest.mark.parametrize(("limits", "name"), [({"max_batch": 4096}, "memory"), ({"examples": 4096}, "the data set")])
def test_flat_step_times_up_to_the_bound_advise_it(limits, name):
    """It said that the best batch was at least that, and to time larger ones, where none fits."""
    batches = [2**i for i in range(13)]
    fit = fit_throughput(batches, [[1e-3, 1.001e-3, 0.999e-3]] * len(batches))
    flat = dataclasses.replace(capacity(**limits, times=[1.0] * len(batches)), model=fit)
    found = advise(flat, noise(40))
    assert found.answer == f"Use batch 4,096, the largest that {name} allows."
    assert "larger ones" not in found.text
    larger = advise(dataclasses.replace(flat, max_batch=10**6, workload=None), noise(40))
    assert larger.answer == "The best batch is not known yet; it is at least 4,096."
    assert "Time larger ones" in larger.text


FITTED = BRANCHES["fitted"][0]


@pytest.mark.parametrize(
    ("value", "low", "high", "told"), [(5, 512, None, True), (5000, None, 8, True), (60, 100, None, False)]
)
def test_branches_that_only_bound_are_heard_beside_a_noise_scale(value, low, high, told):
    """They gave way without a word: "critical batch 5" beside branches that saved steps in proportion up to 512."""
    fit = dataclasses.replace(FITTED.fit, critical_batch=None, b50=None, low=low, high=high)
    steps = Convergence((), branches=(dataclasses.replace(FITTED, fit=fit, tuned=True),))
    alone, found = advise(capacity(), noise(value)), advise(capacity(), noise(value), steps)
    assert found.critical_batch == pytest.approx(value)
    assert ("The evidence disagrees on the critical batch: the noise scale" in found.text) == told
    if told:
        assert found.confidence.level == "low"
        assert (found.critical_high if low else found.critical_low) == pytest.approx(low or high)
        assert f"at {'least' if low else 'most'} {low or high}" in found.text
        assert (found.best_batch > alone.best_batch) == (low is not None)
    else:
        assert (found.critical_low, found.critical_high) == (alone.critical_low, alone.critical_high)


@pytest.mark.parametrize(("bound", "told"), [(30_000, True), (900, False)])
def test_a_noise_scale_that_only_bounds_is_heard_beside_what_was_measured(bound, told):
    beside = noise(None, low=bound, status="lower_bound")
    branches = Convergence((), branches=(dataclasses.replace(FITTED, tuned=True),))
    found = advise(capacity(), beside, branches)
    assert ("The evidence disagrees" in found.text) == told
    assert found.critical_batch == pytest.approx(FITTED.fit.critical_batch)


def test_a_wall_past_a_cliff_that_gives_fewer_examples_a_second_is_not_told():
    """ "At batch 346, the saturation batch: 0.79 times the examples per second" is not what the device can take."""
    steep = [2.0 * (1 + b / 60 * (2.5 if b > 256 else 1)) for b in BATCHES]
    found = advise(capacity(throughput(0.002, 1 / 30_000), times=steep), noise(600))
    assert found.best_batch <= 256
    assert "the saturation batch" not in found.text
    even = [2.0 * (1 + b / 60) for b in BATCHES]
    assert "the saturation batch" in advise(capacity(throughput(0.002, 1 / 30_000), times=even), noise(100)).text
