"""The verdict for every combination of evidence: what limits, the best batch by the closed form, what the notes owe.

What is expected is worked out here from the rules alone: readings weighed on the log scale with the factor each stands
for; B* = sqrt(critical batch x half batch) within memory; two sides compare beyond the error of both.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cases.verdicts import (
    BATCHES,
    BRANCHES,
    MODELS,
    SWEEP,
    capacity,
    curve,
    exact,
    noise,
    swept_by,
    throughput,
    unaccounted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from pybatch.answer.best import _measured
from pybatch.answer.critical import shaped
from pybatch.answer.verdict import advise, ensemble
from pybatch.base.errors import UsageError
from pybatch.fits.steps_model import predicted
from pybatch.records import (
    BatchPoint,
    Capacity,
    Convergence,
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


def expected_critical(swept, branched, scale):
    """The rules by themselves: (value, low, high) and the source, of what each piece says or None."""
    factors = {"sweep": 1.0, "branch": 8.0, "noise": 4.0}
    pieces = {k: v for k, v in (("sweep", swept), ("branch", branched), ("noise", scale)) if v is not None and v[0]}
    bound = swept if swept is not None and swept[0] is None else None

    def error(name):
        value, low, high = pieces[name]
        return np.mean([math.hypot(math.log(end / value), math.log(factors[name])) for end in (low, high)]) / 1.96

    def clash(one, other):
        ratio = abs(math.log(pieces[one][0] / pieces[other][0]))
        return ratio > 1.96 * math.hypot(error(one), error(other))

    if "sweep" in pieces:
        pieces = {name: piece for name, piece in pieces.items() if not clash("sweep", name)}
    if not pieces:
        return (bound, "sweep") if bound else ((scale, "noise") if scale else (None, None))
    weights = {name: error(name) ** -2 for name in pieces}
    log = sum(w * math.log(pieces[name][0]) for name, w in weights.items()) / sum(weights.values())
    spread = sum(weights.values()) ** -0.5
    if "sweep" not in pieces and len(pieces) == 2 and clash(*pieces):
        chi = sum(w * (math.log(pieces[name][0]) - log) ** 2 for name, w in weights.items())
        spread *= math.sqrt(chi)
    source = next(iter(pieces))
    if bound is None:
        return (math.exp(log), math.exp(log - 1.96 * spread), math.exp(log + 1.96 * spread)), source
    ends = [norm.cdf((math.log(end) - log) / spread) if end else None for end in bound[1:]]
    low, high = ends[0] or 0.0, 1.0 if ends[1] is None else ends[1]
    if high - low < 0.05:
        return bound, "sweep"
    value = (math.exp(log + spread * norm.ppf(low + q * (high - low))) for q in (0.5, 0.025, 0.975))
    return tuple(value), source


def expected_limit(known, most):
    """Against the half batch, or the largest that fits where that is smaller."""
    if known is None or most is None:
        return "unresolved"
    value, low, high = known
    ends = (HALF / SPREAD, HALF * SPREAD) if most > HALF / SPREAD else (most, most)
    if low is not None and low > ends[1]:
        return "hardware"
    if high is not None and high < ends[0]:
        return "noise"
    return "unresolved" if value is None else "balanced"


@pytest.mark.parametrize(("noises", "device", "sweep", "branch"), CASES)
def test_every_combination(noises, device, sweep, branch):
    (scale, by_noise), (measured, wall, most) = NOISE[noises], CAPACITY[device]
    (swept, by_sweep), (branched, by_branch) = SWEEP[sweep], BRANCHES[branch]
    steps = Convergence((swept,), branches=(branched,) if branched else ())
    verdict = advise(measured, scale, steps)

    known, source = expected_critical(by_sweep, by_branch, by_noise)
    value, low, high = known or (None, None, None)
    assert verdict.critical_source == source
    for found, wanted in ((verdict.critical_batch, value), (verdict.critical_low, low), (verdict.critical_high, high)):
        assert found == (None if wanted is None else pytest.approx(wanted, rel=0.02))
    assert verdict.limit == expected_limit(known, most)

    advised = value is not None and wall is not None
    if advised:
        optimum = min(math.sqrt(value * HALF), most)
        assert abs(math.log2(verdict.best_batch / optimum)) < 0.6
        assert verdict.best_low <= verdict.best_batch <= verdict.best_high <= most
    else:
        assert verdict.best_batch is None
    if value is None and wall is not None:  # bounds alone
        assert verdict.best_low == (None if low is None else math.floor(min(math.sqrt(low * HALF), most)))
        assert verdict.best_high == (None if high is None else math.ceil(math.sqrt(high * HALF)))
    timed = source == "sweep" and advised
    if timed:
        swept_steps = 500 * (1 + 200 / verdict.best_batch)
        step = throughput().step_s(verdict.best_batch)
        assert verdict.time_to_target == pytest.approx(swept_steps * step, rel=0.1)
    owed = {"critical_batch": value, "best_batch": advised or None, "useful_devices": advised or None}
    owed |= {"time_to_target": timed or None, "saturation_batch": wall}
    notes = {note.figure for note in verdict.notes}
    for figure, known_figure in owed.items():
        assert (f"verdict.{figure}" in notes) == (known_figure is None), figure
        assert (figure in {r.figure for r in verdict.reasons}) or known_figure is None, figure
    assert unaccounted(verdict) == set()


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("lower bound", "at least 4,100 (by measured steps), above the device's half batch"),
        (
            "upper bound",
            "The best batch is not known yet; it is at most 13. The critical batch is at most 4 (by measured steps), "
            "below the",
        ),
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
    found = ensemble(capacity(max_batch=None if most == math.inf else int(most)), None, swept_by(fit))
    assert found.optimum() == pytest.approx(grid[np.argmin(time)], rel=0.05)
    assert found.time(found.optimum()) == pytest.approx(time.min(), rel=0.01)
    assert np.quantile(found.optima, 0.025) <= grid[np.argmin(time)] * 1.03
    assert np.quantile(found.optima, 0.975) >= grid[np.argmin(time)] / 1.03
    if most == math.inf:
        hyperbola = math.sqrt(fit.critical_batch * HALF)
        assert abs(math.log(grid[np.argmin(time)] / hyperbola)) > 0.02


@pytest.mark.parametrize("model", MODELS)
def test_time_doubling_and_frontier_follow_the_fitted_curve(model):
    fit = MODELS[model]
    verdict = advise(capacity(), None, swept_by(fit))
    best, step = verdict.best_batch, throughput().step_s

    def steps(batch):
        return predicted(model, fit.parameters, batch)

    assert verdict.time_to_target == pytest.approx(steps(best) * step(best), rel=0.02)
    twice = verdict.why("doubling").inputs
    assert twice["steps_factor"] == pytest.approx(steps(2 * best) / steps(best), rel=0.02)
    factor = steps(2 * best) * step(2 * best) / (steps(best) * step(best))
    assert twice["time_factor"] == pytest.approx(factor, rel=0.02)
    assert twice["time_factor_low"] < factor < twice["time_factor_high"]
    grid = np.geomspace(1, 1e5, 20_000)
    curve = np.array([steps(b) for b in grid])
    alone = (curve * (0.008 + 2e-4 * grid)).min()
    for point in verdict.frontier[:4]:  # at batch sizes that were run
        wanted = (curve * (0.008 + 2e-4 * grid / point.devices)).min()
        assert point.time_factor == pytest.approx(wanted / alone, rel=0.03)
    assert verdict.why("critical_batch").inputs["model"] == model
    assert unaccounted(verdict) == set()


@given(
    alpha=st.floats(1e-6, 1.0),
    half=st.floats(0.5, 1e5),
    critical=st.floats(0.5, 1e6),
    width=st.floats(1.01, 30.0),
    most=st.one_of(st.none(), st.integers(1, 10**6)),
    examples=st.one_of(st.none(), st.integers(1, 10**6)),
    source=st.sampled_from(["noise", "lower bound", "sweep", "bound", *MODELS]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_number_said_is_in_the_record(alpha, half, critical, width, most, examples, source):
    """Whatever was measured: no sentence has a number of its own, and none contradicts a figure beside it."""
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
        consistent(verdict, device)


def consistent(verdict, device):
    """What the sentences say of each other: the advice, its interval, the sides, the factors."""
    best, wall = verdict.best_batch, min(device.max_batch or math.inf, device.workload.examples or math.inf)
    assert best <= wall
    assert verdict.best_low <= best
    assert verdict.best_high is None or best <= verdict.best_high <= wall
    [limit] = [r.inputs for r in verdict.reasons if r.figure == "limit"]
    sides = {"noise": "Gradient noise sets the limit", "hardware": "The device sets the limit"}
    for side, words in sides.items():
        assert words not in verdict.text or verdict.limit == side
    half = min(device.model.half_batch, wall)
    if "Gradient noise sets" in verdict.text:
        assert verdict.critical_batch < half
    if "The device sets" in verdict.text:
        assert verdict.critical_batch > half
    if "between them time is least" in verdict.because:
        assert min(verdict.critical_batch, half) <= best <= max(verdict.critical_batch, device.model.half_batch)
    if "ends at batch" in verdict.because:
        assert best > 0.7 * wall or wall < 16
    if "time_factor" in limit:  # going on is told where it costs time, never where it saves some
        assert limit["time_factor"] >= 1.05  # less is told as "1.0 times"
        assert limit["examples_factor"] / limit["throughput_factor"] == pytest.approx(limit["time_factor"], rel=0.1)
    for reason in (r for r in verdict.reasons if r.figure == "doubling"):  # it would have been advised
        assert reason.inputs["time_factor"] > 0.99
        assert reason.inputs["time_factor_low"] <= reason.inputs["time_factor"] <= reason.inputs["time_factor_high"]
    if verdict.useful_devices == 1 and len(verdict.frontier) > 1:
        assert 1 / (2 * verdict.frontier[1].time_factor) < 0.8 + 1e-3
    level, reasons = verdict.confidence.level, verdict.confidence.reasons
    assert f"Confidence: {level}" in verdict.answer
    assert level != "high" or verdict.critical_source == "sweep"
    assert level == "high" or reasons


def test_the_batch_advised_is_no_slower_than_twice_or_half_of_it_by_what_was_measured():
    """Where members smooth a cliff away, the advice said of its own double that it takes less time."""
    model, sizes = exact(throughput(), 200.0), [16, 32, 64, 128, 256, 512]
    own = {b: 1e3 * model.step_s(b) for b in sizes}
    chosen = model.best(sizes)

    def moved(times, among=sizes, error=0.003):
        points = capacity(batches=list(times), times=list(times.values()), error=error).batches
        return _measured(chosen, among, model, points)

    assert chosen == 64
    assert moved(own) == chosen
    faster = own | {128: 0.8 * own[128]}
    assert moved(faster) == 128
    assert moved(faster | {256: 0.5 * own[256]}) == 256  # and on from there
    assert moved(own | {32: 0.7 * own[32]}) == 32
    assert moved(faster, error=0.3) == chosen  # not surely
    assert moved({b: t for b, t in faster.items() if b != 128}) == chosen  # not timed
    assert moved(faster, among=[16, 32, 64]) == chosen  # beyond what can be used


def test_one_sentence_says_between_only_of_a_batch_that_is():
    """A knee, or a wave, may put the batch of least time outside."""
    device = capacity()
    because = advise(device, None, Convergence((curve(200.0, 160.0, 250.0),))).because
    assert because.endswith("; between them time is least.")
    slow = [1e3 * throughput().step_s(b) * (5.0 if 16 < b < 512 else 1.0) for b in BATCHES]
    verdict = advise(capacity(times=slow, error=0.001), None, Convergence((curve(200.0, 160.0, 250.0),)))
    assert not HALF <= verdict.best_batch <= 200
    assert "between them" not in verdict.because


def test_an_open_half_batch_agrees_with_nothing():
    wide = dataclasses.replace(throughput(), half_low=HALF / 2, half_high=None)
    verdict = advise(capacity(wide), noise(100, 50, 200))
    assert verdict.limit == "unresolved"
    assert "not known well enough to compare the critical batch with it" in verdict.why("limit").text
    assert advise(capacity(wide), noise(2, 1.8, 2.2)).limit == "noise"  # below its lower end all the same


def test_why_takes_an_end_for_its_figure_and_no_object():
    verdict = advise(capacity(), noise(100, 50, 200))
    assert verdict.why("best_low") == verdict.why("best_high") == verdict.why("best_batch")
    assert verdict.why("useful_devices_high") == verdict.why("useful_devices")
    for wrong in (["best_batch"], 3, "nothing"):
        with pytest.raises(UsageError, match="figure"):
            verdict.why(wrong)


def test_only_a_curve_that_is_known_has_a_shape():
    assert shaped(None) is None
    assert shaped(dataclasses.replace(MODELS["power"], model=None)) is None
    assert shaped(dataclasses.replace(MODELS["power"], parameters={})) is None
    assert shaped(dataclasses.replace(MODELS["power"], critical_batch=None)) is None
    assert shaped(MODELS["power"]) is MODELS["power"]
    assert ensemble(capacity(), None, None) is None
