"""The study: its claims on planted records, its regret, its commands, and its page against its records."""

import dataclasses
import itertools
import json
import math
import shlex

import judging
import numpy as np
import planted_verdict
import pytest
from cases.points import curve
from cases.verdicts import capacity
from study import advice, claims, pictures
from study import page as writer
from study import run as runner
from study.declaration import DOMAINS, JUDGE, PARTS, TRAIN
from study.records import Study, read
from study.run import RECORDS, command, store_of, whole

from pybatch import cli
from pybatch.base.ranges import parse_batches
from pybatch.device.environment import capture
from pybatch.fits.throughput import fit_throughput
from pybatch.records import (
    BatchPoint,
    Convergence,
    ConvergencePoint,
    Curve,
    Note,
    RateSteps,
    Run,
    Verdict,
    WorkloadInfo,
)
from pybatch.sweep.budget import checked_budget
from pybatch.workloads.running.finding import find

BATCHES = tuple(8 * 2**k for k in range(8))
SEEDS = (0.98, 1.0, 1.03)


def point(batch, steps, **more):
    """A point whose seeds take these steps, up to a factor of their own; None: not reached."""
    own = tuple(steps * f if steps else None for f in SEEDS)
    status = "reached" if steps else "not_reached"
    rates = (RateSteps(0.5, own, (status,) * 3),)
    return ConvergencePoint(batch, steps, status, 3, 0.5, reached=3 * bool(steps), rates=rates, **more)


def swept(*curves, optimizer="sgd", base=8, **more):
    info = WorkloadInfo("digits", "images", 100, "fp32")
    steps = Convergence(tuple(curves), optimizer=optimizer, base_batch=base, seeds=3, workload=info, **more)
    return Run("2026-11-29T21:00:00+00:00", None, convergence=steps)


def hyperbola(s_min=100.0, critical=50.0, rule="tuned", cut=math.inf, times=1.0, **fit):
    """A curve of steps `times` S_min (1 + B_c / B), not reached past a batch size."""
    steps = {b: times * s_min * (1 + critical / b) if b <= cut else None for b in BATCHES}
    return curve(rule, [point(b, s) for b, s in steps.items()], **fit)


def bench(saturation=2000.0, most=100_000, **more):
    found = capacity(max_batch=most)
    ends = {"saturation_low": saturation / 1.2, "saturation_high": saturation * 1.2}
    found = dataclasses.replace(found, saturation_batch=saturation, **ends, **more)
    return Run("2026-11-29T21:00:00+00:00", None, capacity=found)


# The four questions.


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, "holds"),
        ({"b_stag_low": 2.0, "b_stag_high": 260.0}, "undetermined"),  # it spans a factor of 100
        ({"b_stag_high": 5000.0}, "undetermined"),
        ({"b_stag": 5000.0, "b_stag_low": 3000.0, "b_stag_high": 9000.0}, "does not hold"),
    ],
)
def test_steps_level_off_where_every_problem_says_so(changes, finding):
    found = claims.levels_off({"one": {"sweep": swept(hyperbola())}, "other": {"sweep": swept(hyperbola(**changes))}})
    assert found.finding == finding
    assert [row.finding for row in found.rows] == ["holds", finding]


@pytest.mark.parametrize(
    ("saturation", "most", "ends", "finding"),
    [
        (2000.0, 100_000, (40.0, 60.0), "holds"),
        (10.0, 100_000, (40.0, 60.0), "does not hold"),
        (2000.0, 20, (40.0, 60.0), "does not hold"),  # what is full first is memory
        (55.0, 100_000, (40.0, 60.0), "undetermined"),
        (2000.0, 100_000, (1.0, 110.0), "undetermined"),  # it spans a factor of 100
        (50_000.0, 100_000, (5.0, 400.0), "undetermined"),  # with the saturation batch's own error it does
    ],
)
def test_the_critical_batch_is_held_against_what_is_full_first(saturation, most, ends, finding):
    low, high = ends
    records = {"sweep": swept(hyperbola(low=low, high=high)), "bench": bench(saturation, most)}
    assert claims.below_capacity({"one": records}).finding == finding
    assert claims.below_capacity({"one": {"sweep": records["sweep"]}}).finding == "not measured"


def test_a_saturation_timed_on_a_busy_machine_decides_nothing():
    records = {"sweep": swept(hyperbola()), "bench": bench(2000.0, disturbed=("others kept 1 of 2 cores busy",))}
    found = claims.below_capacity({"one": records})
    assert found.finding == "undetermined"
    assert "disturbed" in found.rows[0].cells[4]
    again = records | {"thorough": bench(2800.0, disturbed=("others kept 1 of 2 cores busy",))}
    found = claims.below_capacity({"one": again})  # two runs: the interval is that of both
    assert (found.finding, found.rows[0].cells[4]) == ("holds", "2,000 [1,670 to 3,360]")
    unknown = dataclasses.replace(again["thorough"].capacity, saturation_low=None, saturation_high=None)
    found = claims.below_capacity({"one": records | {"thorough": Run("", None, capacity=unknown)}})
    assert (found.finding, found.rows[0].cells[4]) == ("undetermined", "2,000 [1,670 to 2,400], disturbed")
    found = claims.below_capacity({"one": again | {"bench": Run("", None, capacity=unknown)}})
    assert found.rows[0].cells[4] == "2,800 [2,330 to 3,360], disturbed"
    apart = records | {"thorough": bench(55.0, disturbed=("others kept 1 of 2 cores busy",))}
    assert claims.below_capacity({"one": apart}).finding == "undetermined"


def test_what_fits_is_what_was_run_where_it_was():
    """A prediction of one run says less than a batch that another one ran, though it be larger."""
    records = {"sweep": swept(hyperbola()), "bench": bench(most=100_000, max_batch_verified=False)}
    assert claims.below_capacity({"one": records}).rows[0].cells[5] == "100,000, predicted"
    ran = records | {"thorough": bench(most=60_000, max_batch_verified=True)}
    assert claims.below_capacity({"one": ran}).rows[0].cells[5] == "60,000"
    traces = pictures.headline({"one": ran, "two": records}).traces
    assert [t["name"] for t in traces][-2:] == ["fits in memory", "fits in memory, predicted"]
    assert pictures.headline({"one": ran}).layout["yaxis"]["ticktext"] == ["one, sgd"]


def test_seeds_that_were_lost_and_what_a_fit_says_of_itself_stand_below_the_table():
    whole = hyperbola()
    lost = dataclasses.replace(whole.points[2], reached=2)
    points = tuple(lost if p.batch == lost.batch else p for p in whole.points)
    note = Note("critical_batch", "no model here follows them. Test more")
    short = dataclasses.replace(whole, points=points, notes=(note, Note("points", "else")))
    assert claims.levels_off({"one": {"sweep": swept(whole)}}).below == ()
    [said] = claims.levels_off({"one": {"sweep": swept(short)}}).below
    aim = claims.goal(short)
    assert said == f"one, {aim}: 2 of 3 seeds reached at batch {lost.batch}; no model here follows them."
    assert said in writer._question("RQ1: do they?", claims.levels_off({"one": {"sweep": swept(short)}}), "digits", "-")


def test_networks_of_one_domain_are_compared_by_one_optimizer():
    larger = dataclasses.replace(hyperbola(), critical_batch=100.0, low=80.0, high=125.0)
    two = {"digits-a": {"sweep": swept(hyperbola())}, "digits-b": {"sweep": swept(larger)}}
    [said] = claims.architectures(two)
    assert said.startswith(f"digits-b over digits-a, {claims.goal(hyperbola())}: 2 [")
    other = two | {"digits-b": {"sweep": swept(hyperbola(), optimizer="adamw")}}
    apart = {"digits-a": two["digits-a"], "text-b": two["digits-b"]}
    assert claims.architectures(other) == claims.architectures(apart) == []


@pytest.mark.parametrize(
    ("taken", "ends", "finding"),
    [
        (60.0, (15.0, 240.0), "holds"),
        (200.0, (65.0, 800.0), "does not hold"),  # apart
        (100.0, (55.0, 400.0), "undetermined"),  # the measured interval reaches into it, the value does not
        (60.0, (5.0, 600.0), "undetermined"),  # it spans a factor of 100
    ],
)
def test_a_noise_scale_agrees_where_it_holds_the_measured_value(taken, ends, finding):
    verdict = dataclasses.replace(
        advised(64).verdict, critical_batch=taken, critical_low=ends[0], critical_high=ends[1]
    )
    problem = {"bench": Run("", None, verdict=verdict), "judge": swept(hyperbola(), optimizer="adamw")}
    assert claims.noise_predicts({"one": problem}).finding == finding
    assert claims.noise_predicts({"one": {"bench": problem["bench"]}}).finding == "not measured"


def test_rules_fail_where_they_do_not_reach_and_each_problem_says_where():
    constant = hyperbola(rule="constant", times=1.1)
    tables = {
        name: {
            "sweep": swept(hyperbola(), hyperbola(rule="linear", cut=cut, times=0.99), constant),
            "bench": bench(1280.0),
        }
        for name, cut in (("one", 32), ("other", 128))
    }
    found = claims.rules_fail(tables)
    assert found.finding == "holds"
    rows = {(row.cells[0], row.cells[2]): row for row in found.rows}
    assert rows["one", "linear"].cells[4:7] == ("32", "64", "5.0 %")
    assert rows["other", "linear"].cells[4:7] == ("128", "256", "20.0 %")
    assert rows["one", "constant"].finding is None  # it scales nothing, and may hold
    assert "linear to the train target fails at 64 to 256" in found.text


def test_a_rule_that_holds_everywhere_speaks_against_the_claim():
    tables = {"one": {"sweep": swept(hyperbola(), hyperbola(rule="sqrt", times=1.01))}}
    assert claims.rules_fail(tables).finding == "does not hold"
    assert claims.rules_fail({}).finding == "not measured"


def factorial(architecture, complexity, size, half=0.2):
    """Eight sweeps whose critical batches differ by these factors, with intervals of half a width in the logarithm."""
    runs = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        critical = 50 * architecture**a * complexity**b * size**c
        dials = {"label_noise": (0.0, 0.05)[b], "subset": (0.25, 1.0)[c]}
        info = WorkloadInfo("digits", "images", 100, "fp32", model=("cnn", "mlp")[a], options=dials)
        ends = critical * math.exp(-half), critical * math.exp(half)
        one = Curve("tuned", "train", (), 50.0, critical, *ends, target=0.5)
        runs.append(Run("", None, convergence=Convergence((one,), optimizer="sgd", workload=info)))
    return runs


@pytest.mark.parametrize(
    ("planted", "finding"),
    [
        ((3.0, 4.0, 1.0), "holds"),
        ((1 / 3, 4.0, 1.05), "holds"),
        ((1.0, 1.0, 1.0), "undetermined"),
        ((2.0, 2.0, 2.0), "undetermined"),
        ((3.0, 1.0, 1.0), "undetermined"),  # complexity is not told from size
        ((1.0, 1.0, 4.0), "does not hold"),
        ((9.0, 1.0, 4.0), "does not hold"),
    ],
)
def test_data_size_matters_least_only_where_both_others_surely_matter_more(planted, finding):
    assert claims.size_matters_least(factorial(*planted)).finding == finding


def test_wide_intervals_leave_the_order_open_and_too_few_dials_give_none():
    assert claims.size_matters_least(factorial(3.0, 4.0, 1.0, half=1.5)).finding == "undetermined"
    assert claims.size_matters_least(factorial(3.0, 4.0, 1.0)[:2]).finding == "not measured"


@pytest.mark.parametrize(
    ("rise", "scatter", "finding"),
    [
        (0.05, 0.001, "does not hold"),
        (-0.05, 0.001, "holds"),
        (0.0, 0.0005, "undetermined"),
        (0.0, 0.02, "undetermined"),
        (0.0019, 0.001, "undetermined"),
    ],
)
def test_the_counter_arm_is_of_tuned_rates_alone(rise, scatter, finding):
    """Test losses at equal train loss that rise with the batch speak against Shallue, whatever a fixed rule does."""

    def arm(rule, slope):
        # Each seed has a slope of its own.
        losses = {b: tuple(0.2 + (slope + own * scatter) * math.log2(b / 8) for own in (0, 1, -1)) for b in BATCHES}
        return curve(rule, [point(b, 100.0, other_losses=losses[b]) for b in BATCHES])

    found = claims.generalizes_worse({"one": {"sweep": swept(arm("tuned", rise), arm("linear", 0.1))}})
    assert found.finding == finding
    assert [row.finding for row in found.rows if row.cells[1] == "linear"] == [None]
    grown, most = (found.rows[0].cells[place] for place in (3, 4))
    high = float(grown.partition(" to ")[2].rstrip("]"))
    losses = [0.2 + rise * math.log2(b / 8) for b in BATCHES]
    share = max(0.0, high) * math.log2(BATCHES[-1] / BATCHES[0]) / (sum(losses) / len(losses))
    assert float(most.rstrip(" %")) == pytest.approx(100 * share, rel=0.02)  # of the test loss, over all batch sizes
    assert bool(found.below) == (finding == "does not hold" or rise < 0.05)  # rows that grow are told in full


def test_muon_is_held_against_adamw_to_the_same_target():
    def by(optimizer, critical):
        ends = {"low": critical / 1.2, "high": critical * 1.2}
        one = dataclasses.replace(hyperbola(**ends), critical_batch=critical)
        return swept(one, optimizer=optimizer)

    for critical, finding in ((150.0, "holds"), (20.0, "does not hold"), (50.0, "undetermined")):
        problem = {"sweep": by("sgd", 30.0), "own": by("adamw", 50.0), "muon": by("muon", critical)}
        assert claims.optimizers_differ({"one": problem}).finding == finding
    assert claims.optimizers_differ({"one": {"own": by("adamw", 50.0)}}).finding == "not measured"
    ratio, low, high = claims.ratio_of(hyperbola(low=25.0, high=100.0), hyperbola(low=50.0, high=50.0))
    assert (ratio, low, high) == pytest.approx((1, 0.5, 2))
    ratio, low, high = claims.ratio_of(hyperbola(low=50.0, high=50.0), hyperbola(low=25.0, high=50.0))
    assert (ratio, low, high) == pytest.approx((1, 1, 2))  # what may be less below the line is more above it


@pytest.mark.parametrize(
    ("findings", "finding"),
    [
        (("holds", "holds", "not measured"), "holds"),
        (("holds", "undetermined"), "undetermined"),
        (("holds", "undetermined", "does not hold"), "does not hold"),
        (("not measured",), "not measured"),
        ((), "not measured"),
    ],
)
def test_a_claim_holds_only_where_no_problem_leaves_it_open(findings, finding):
    assert claims.overall(findings) == finding


# Regret.


def advised(batch, reason=None):
    """A bench whose verdict is this batch, with its critical batch 50."""
    verdict = Verdict(50.0, 40.0, 60.0, "noise", None, batch, None, None, "noise", None, None, "")
    return Run("", None, verdict=verdict)


def records_of(batch, step_ms=lambda b: 1 + b / 64):
    """A judge with S = 100 (1 + 64 / B) and step times of 1 + B / 64 ms: least time at batch 64."""
    fitted = {"critical_batch": 64.0, "low": 55.0, "high": 75.0, "parameters": {"s_min": 100.0, "b_c": 64.0}}
    judge = swept(hyperbola(critical=64.0, **fitted), optimizer="adamw")
    return {"bench": advised(batch), "judge": judge, "times-0": Run("", None, capacity=clock(step_ms))}


def clock(step_ms, **more):
    """Step times at the judge's batch sizes, known within 1 %."""
    timed = {b: step_ms(b) for b in BATCHES}
    points = tuple(BatchPoint(b, "ok", t, t / 1.01, t * 1.01, 1e3 * b / t, samples=10) for b, t in timed.items())
    fit = fit_throughput(list(timed), [t / 1e3 for t in timed.values()])
    return dataclasses.replace(capacity(), batches=points, model=fit, **more)


def test_regret_is_time_at_the_batch_advised_over_the_least():
    best, at_256 = advice.judged(records_of(64))[0], advice.judged(records_of(256))[0]
    assert (best.measured, best.best, best.met, best.remark) == (1.0, 64, "met", "50 [40 to 60]")
    exact = (1 + 64 / 256) * (1 + 256 / 64) / 4
    assert best.regret == pytest.approx(1, abs=0.01)
    assert at_256.measured == pytest.approx(exact)
    assert at_256.low < exact < at_256.high
    assert at_256.regret == pytest.approx(exact, rel=0.02)
    assert at_256.met == "missed"
    assert advice.judge_of(records_of(256)) == ["critical batch 50 [55 to 75]", "3 seeds"]


def test_between_batches_measured_a_curve_is_taken_and_not_its_chord():
    """Without batch 64, where time is least, its neighbours' chord lies above T(64); the curve does not."""
    records = records_of(64)
    [curve] = records["judge"].convergence.curves
    few = dataclasses.replace(curve, points=tuple(p for p in curve.points if p.batch != 64))
    steps = dataclasses.replace(records["judge"].convergence, curves=(few,))
    row = advice.judged(records | {"judge": dataclasses.replace(records["judge"], convergence=steps)})[0]
    assert row.measured == pytest.approx(1.0)  # of the chord over its own ends, both 1.125 times the least
    assert row.regret == pytest.approx(1.0, abs=0.01)
    at_32 = advice.judged(records_of(32) | {"judge": dataclasses.replace(records["judge"], convergence=steps)})[0]
    assert at_32.measured == pytest.approx(1.0)
    assert at_32.regret == pytest.approx(1.125, rel=0.02)


def test_intervals_of_the_judge_hold_the_regret_of_planted_truths():
    """Sweeps and step times as `planted_verdict` draws them, batches a factor of up to 4 from the best one."""
    rng = np.random.default_rng(3)
    held = []
    for truth in planted_verdict.truths(rng):
        steps, timed = planted_verdict.swept(truth, rng), planted_verdict.timed(truth, rng)
        by = judging.judge(steps, [timed])
        sizes = np.arange(min(by.measured), max(by.measured) + 1)
        time = truth.time[sizes - 1]
        best = int(sizes[time.argmin()])
        for batch in (best, int(np.clip(best * 4 ** rng.uniform(-1, 1), sizes[0], sizes[-1]))):
            row = judging.regret(advised(batch).verdict, by)
            held.append(row["regret_low"] <= time[batch - sizes[0]] / time.min() <= row["regret_high"])
    assert len(held) == 60
    assert np.mean(held[::2]) >= 0.9
    assert np.mean(held[1::2]) >= 0.9


def test_what_runs_differ_by_is_in_the_interval_and_their_speed_is_not():
    """Three runs, one on a machine of half the speed: ratios of step times are as exact as the runs agree on them."""
    exact = clock(lambda b: 1 + b / 64)
    slow = clock(lambda b: 2 * (1 + b / 64))
    own = judging.pooled([exact, slow, exact])
    ratios = [p.step_ms / (1 + p.batch / 64) for p in own.batches]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert [p.step_ms_high / p.step_ms for p in own.batches] == pytest.approx([1.01**3**-0.5] * len(BATCHES), rel=1e-3)
    shaken = [clock(lambda b, s=s: (1 + b / 64) * math.exp(s * (-1) ** BATCHES.index(b))) for s in (0.1, -0.1, 0.0)]
    wide = judging.pooled(shaken)
    # of two-way layout: sum of squares 8 * 2 * 0.1^2 over 14 degrees of freedom, of a mean of three
    error = math.sqrt(8 * 2 * 0.01 / 14 / 3)
    assert [math.log(p.step_ms_high / p.step_ms) for p in wide.batches] == pytest.approx([1.96 * error] * 8, rel=1e-3)


def test_what_is_not_run_has_a_reason_and_no_figure():
    rows = {row.by: row for row in advice.judged(records_of(64))}
    assert rows["`bench --thorough`"].regret is None
    assert rows["`bench --thorough`"].remark == "not run: thorough"
    assert rows["`bench` and a sweep"].met == "not measured"
    alone = advice.judged({"bench": advised(64)})[0]
    assert (alone.regret, alone.remark) == (None, "not run: judge, times")
    beyond = advice.judged(records_of(4096))[0]
    assert (beyond.regret, beyond.remark) == (None, "batch 4096 is outside those the sweep measured, 8 to 1024")
    none = advice.judged(records_of(None))[0]
    assert (none.met, none.remark) == ("not measured", "no batch was recommended")


def test_a_goal_inside_the_interval_is_neither_met_nor_missed():
    row = advice.judged(records_of(64))[0]
    for low, high, said in ((1.0, 1.2, "met"), (1.0, 1.3, "undetermined"), (1.3, 1.4, "missed"), (1.0, 150.0, "unde")):
        assert dataclasses.replace(row, low=low, high=high).met.startswith(said)


def test_a_judge_without_a_curve_of_steps_measures_and_decides_nothing():
    records = records_of(256)
    records["judge"] = swept(hyperbola(critical=64.0), optimizer="adamw")
    row = advice.judged(records)[0]
    assert (row.regret, row.met, row.measured) == (None, "not measured", pytest.approx(1.5625))
    assert row.remark == "the sweep that judges has no critical batch"
    few = clock(lambda b: 1 + b / 64)
    few = dataclasses.replace(few, batches=few.batches[:2])
    records = records_of(8) | {"times-1": Run("", None, capacity=few)}
    assert advice.judged(records)[0].remark == "fewer than three of the judge's batch sizes were timed by every run"
    none = dataclasses.replace(few, batches=())
    records = records_of(8) | {"times-1": Run("", None, capacity=none)}
    assert advice.judged(records)[0].remark == "0 batch sizes of the judge reached the target and had its steps timed"


def test_without_an_interval_no_goal_is_met():
    row = dataclasses.replace(advice.judged(records_of(64))[0], low=None, high=None)
    assert row.met == "undetermined"


def test_a_judge_that_was_disturbed_decides_nothing_alone():
    records = records_of(256)
    busy = clock(lambda b: 1 + b / 64, disturbed=("others kept 1 of 2 cores busy",))
    alone = records | {"times-0": Run("", None, capacity=busy)}
    row = advice.judged(alone)[0]
    assert row.measured == pytest.approx(1.5625)
    assert row.met == "undetermined"
    assert row.remark.endswith("; steps timed once, on a disturbed machine")
    assert advice.judge_of(alone)[-1] == "its steps were timed 1 time, 1 of them on a disturbed machine"
    again = alone | {"times-1": records["times-0"]}
    assert advice.judged(again)[0].met == "missed"
    assert advice.judge_of(again)[-1] == "its steps were timed 2 times, 1 of them on a disturbed machine"
    assert judging.pooled([records["times-0"].capacity, busy]).disturbed == busy.disturbed


def test_a_judge_that_lost_runs_beside_the_batch_decides_nothing():
    """What a run that did not reach would have taken is in no draw."""
    records = records_of(256)
    [curve] = records["judge"].convergence.curves
    for batch, met in ((8, "missed"), (128, "undetermined"), (64, "undetermined"), (512, "undetermined")):
        points = tuple(dataclasses.replace(p, reached=2) if p.batch == batch else p for p in curve.points)
        steps = dataclasses.replace(records["judge"].convergence, curves=(dataclasses.replace(curve, points=points),))
        lossy = records | {"judge": dataclasses.replace(records["judge"], convergence=steps)}
        assert advice.judged(lossy)[0].met == met
        assert advice.judged(lossy)[0].remark.endswith("judge runs lost beside it") == (met == "undetermined")
        assert f"some of its runs did not reach at batch {batch}" in advice.judge_of(lossy)


def test_a_judge_whose_best_batch_is_the_last_decides_nothing():
    records = records_of(512, step_ms=lambda b: 1 + b / 1e5)
    assert advice.judged(records)[0].met == "undetermined"
    assert "its best batch, 1,024, is at an end of those it swept: regret may be more" in advice.judge_of(records)


# What is run.


def test_every_command_is_one_that_pybatch_takes():
    """Parsed, not run: a flag or a value's form that is gone is found here, and not after an hour."""
    commands = {" ".join(r.flags[::2]): r for records in PARTS.values() for r in records if "along" not in r.kind}
    for name, *words in (command(record, 2) for record in commands.values()):
        cli.Commands().get_command(None, name).make_context(name, words)


def test_runs_may_go_on_for_as_many_epochs_as_gaps_are_taken_at():
    for record in (record for records in PARTS.values() for record in records if "--gap-epochs" in record.flags):
        given = dict(zip(record.flags[::2], record.flags[1::2], strict=True))
        examples = find(record.problem.workload, model=record.problem.model).examples
        checked_budget(
            float(given["--gap-epochs"]), examples, parse_batches(given["--batch"]), int(given["--max-steps"])
        )


def test_records_were_made_by_the_commands_of_the_declaration(study):
    for record in (record for records in PARTS.values() for record in records if record.path in study.found):
        if record.kind == "advice" or record.kind.startswith("along"):
            continue
        assert runner.there(record), record.path


def test_a_record_of_an_earlier_declaration_is_made_again(monkeypatch, tmp_path):
    record = next(r for r in PARTS["quick"] if r.kind == "own")
    path = tmp_path / RECORDS / record.path
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    words = ["pybatch", *command(record, 1), "--quiet"]
    for batches, same in ((None, True), ("8,16", False)):
        typed = [batches if batches and word == record.flags[1] else word for word in words]
        environment = dataclasses.replace(capture(seed=0), command=shlex.join(typed))
        path.write_text(Run("", environment).to_json())
        assert runner.there(record) is same


def test_the_targets_are_the_workloads_own():
    for domain, problems in DOMAINS.items():
        assert TRAIN[domain] == f"train={find(domain, model=problems[0].model).target['train']:g}"


def test_what_advises_does_not_judge():
    for record in (record for records in PARTS.values() for record in records):
        first = int(record.flags[record.flags.index("--seed") + 1]) if "--seed" in record.flags else 0
        assert first == (JUDGE if record.kind == "judge" else 0)
        assert store_of(record).endswith("-judge") == (record.kind == "judge")


def test_records_have_names_of_their_own_and_problems_one_store():
    paths = [record.path for records in PARTS.values() for record in records]
    assert len(set(paths)) == len(paths)
    sweeps = [r for r in PARTS["text"] + PARTS["text-advice"] if r.kind in ("sweep", "own")]
    assert len({store_of(r) for r in sweeps}) == len({r.problem for r in sweeps}) == 2


def test_the_factorial_has_every_corner():
    corners = {(r.problem.model, *r.problem.options) for r in PARTS["factorial"]}
    assert len(corners) == len(PARTS["factorial"]) == 8
    assert len({r.flags for r in PARTS["factorial"]}) == 1  # all else is alike


def test_a_record_that_was_cut_is_made_again(tmp_path):
    path = tmp_path / "run.json"
    assert not whole(path)
    for text, is_whole in (('{"complete": false}', False), ('{"complete": true}', True), ('{"complete": tr', False)):
        path.write_text(text)
        assert whole(path) == is_whole


def test_only_step_times_of_a_busy_machine_are_measured_again(tmp_path, monkeypatch):
    bench_, sweep_ = (next(r for r in PARTS["quick"] if r.kind == kind) for kind in ("bench", "sweep"))
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    asked = []
    monkeypatch.setattr(runner, "make", lambda record, *_: asked.append(record.kind) or True)
    paths = [tmp_path / RECORDS / record.path for record in (bench_, sweep_)]
    paths[0].parent.mkdir(parents=True)
    for words, again, made in ((["busy"], True, ["bench"]), (["busy"], False, []), ([], True, [])):
        asked.clear()
        for path, record in zip(paths, (bench_, sweep_), strict=True):
            typed = {"command": shlex.join(["pybatch", *command(record, 2)])}
            kept = {"complete": True, "capacity": {"disturbed": words}, "environment": typed}
            path.write_text(json.dumps(kept))
        assert runner.run([bench_, sweep_], 1, tmp_path, again) == 0
        assert asked == made


# The page.


@pytest.fixture(scope="module")
def study():
    return read(writer.RECORDS)


def test_the_page_is_that_of_the_records(study):
    assert writer.page(study) == writer.PAGE.read_text(), "run: python bench/study/page.py"


def test_its_pictures_are_those_that_can_be_drawn(study):
    """By what they show, not by their names alone: a picture of earlier records is not taken for one of these."""
    drawn = writer.pictures(study.problems())
    assert {path.name for path in writer.PICTURES.glob("*.png")} == {f"{plot.name}.png" for plot in drawn}
    assert json.loads(writer.DRAWN.read_text()) == {
        plot.name: [writer.digest(plot), writer.of_file(plot)] for plot in drawn
    }
    plot = drawn[0]
    other = dataclasses.replace(plot, traces=(plot.traces[0] | {"x": [1.0, 2.0]}, *plot.traces[1:]))
    assert writer.digest(other) != writer.digest(plot)


def test_a_page_without_records_says_what_is_not_run():
    text = writer.page(Study({}))
    assert "Not run yet" in text
    assert text.count("Not measured") >= 4
    for part in ("digits", "factorial", "optimizers"):
        assert f"run.py --part {part}`" in text


def test_a_record_that_was_cut_speaks_of_nothing(tmp_path):
    record = PARTS["quick"][0]
    path = tmp_path / record.path
    path.parent.mkdir()
    for is_whole in (True, False):
        path.write_text(dataclasses.replace(bench(), complete=is_whole).to_json())
        assert list(read(tmp_path).found) == [record.path] * is_whole


def test_a_whole_part_takes_the_place_of_the_quick_one_and_is_not_mixed_with_it():
    mlp = DOMAINS["digits"][0]
    named = {r.path: Run(r.path, None) for part in PARTS.values() for r in part if r.problem == mlp}
    assert {run.created.split("/")[0] for run in Study(named).problems()[mlp.name].values()} == {
        "digits",
        "digits-advice",
        "optimizers",
    }
    quick = {path: run for path, run in named.items() if path.startswith(("quick/", "digits-advice/"))}
    found = Study(quick).problems()[mlp.name]
    assert found["sweep"].created.startswith("quick/")
    assert {found[kind].created.split("/")[0] for kind in ("own", "judge", "times-0", "bench")} == {"digits-advice"}


def test_the_records_are_declared_and_small():
    folder = writer.RECORDS
    files = list(folder.rglob("*.json"))
    declared = {record.path for records in PARTS.values() for record in records}
    assert {str(path.relative_to(folder)) for path in files} <= declared
    assert sum(path.stat().st_size for path in files) < 5e6
    assert folder == writer.ROOT / RECORDS


def test_what_speaks_against_the_paper_is_told_case_by_case():
    low = {"sweep": swept(hyperbola()), "bench": bench(10.0)}
    high = {"sweep": swept(hyperbola()), "bench": bench(2000.0)}
    found = claims.below_capacity({"one": low, "other": high})
    told = writer._against({"RQ2: is it?": found})
    assert "- **RQ2: is it?** the critical batch lies below what the device can take: not so in one, " in told
    assert "other, " not in told
    assert "Nowhere that is sure" in writer._against({"RQ2: is it?": claims.below_capacity({"other": high})})
