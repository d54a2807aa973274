"""The race of rates: which seeds it leaves out, and that the curves it leaves are those of the whole grid."""

import math
from functools import partial

import numpy as np
import pytest

from pybatch.fits.steps import fit_steps
from pybatch.records import ConvergencePoint, RateSteps
from pybatch.scaling import Scaled
from pybatch.sweep.search import EXTENSIONS, SURE, Grid, Racing, best_rate, nearest_rate
from pybatch.sweep.summary import beyond, curve, nearest, point, steps_of
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import Outcome, Study, Trial

SEEDS = (0, 1, 2)
CAP = 100_000
REPEATS = 40
RATES = [2.0**k for k in range(-6, 6)]
BATCHES = [2**k for k in range(2, 12)]


def outcome(batch, lr, seed, steps, limit):
    """A trial whose loss falls to the target between the evaluations at steps - 1 and steps, or not by the limit."""
    trial = Trial("planted", "sgd", Scaled({"lr": lr}), batch, seed, "fp32", "cpu")
    if math.isnan(steps):
        return Outcome(trial, "diverged", made([0, 1], [1.0, math.nan]), 0.0)
    if steps <= limit:
        return Outcome(trial, "met", made([0, steps - 1, steps], [1.0, 1.0, -1e6]), 0.0)
    return Outcome(trial, "capped", made([0, limit], [1.0, 1.0]), 0.0)


def made(steps, losses):
    column = np.array(losses, dtype=np.float32)
    return Trajectory(np.array(steps, dtype=np.int32), column, column)


def play(search, planted, batch, seeds=SEEDS, cap=CAP):
    """Run a search over planted steps(lr, seed); all trials of a proposal go in step, as replicas do."""
    outcomes, proposals = {}, []
    while True:
        study = Study({"train": 0.1}, seeds, cap)
        for each in outcomes.values():
            study.take(each)
        proposal = search.propose(study)
        if proposal is None:
            return study, list(outcomes.values()), proposals
        proposals.append(proposal)
        running = Study({"train": 0.1}, proposal.seeds, cap, margin=proposal.margin)
        for each in outcomes.values():
            running.take(each)
        for lr, seed in sorted(proposal.runs, key=lambda run: planted(*run)):
            steps = planted(lr, seed)
            ended = outcome(batch, lr, seed, steps, math.ceil(running.limit("train", lr)))
            running.take(ended)
            outcomes[lr, seed] = ended


def planted_curves(rng, noise=0.08, shared=0.05):
    """Steps of a hyperbola, S_min 100 and B_c 100, a bowl over rates, log-normal noise; high rates diverge."""
    common = shared * rng.standard_normal(len(SEEDS))
    drawn = {}

    def steps(batch, lr, seed):
        off = math.log(lr / (0.04 * math.sqrt(batch)))
        if off > 1.6:
            return math.nan
        if (batch, lr, seed) not in drawn:
            drawn[batch, lr, seed] = common[seed] + noise * rng.standard_normal()
        return max(2, round(100 * (1 + 100 / batch) * (1 + 0.5 * off**2) * math.exp(drawn[batch, lr, seed])))

    return steps


def fitted(kind, steps):
    points, caps, ran, best = [], {}, 0, []
    for batch in BATCHES:
        search = Racing(Grid(RATES)) if kind == "race" else Grid(RATES)
        study, outcomes, _ = play(search, lambda lr, seed, batch=batch: steps(batch, lr, seed), batch)
        points.append(point(batch, "train", study, outcomes))
        caps[batch] = study.limit("train")
        ran += sum(o.steps for o in outcomes)
        best.append(best_rate(study, "train", sorted({o.trial.lr for o in outcomes})))
    return curve("tuned", "train", 0.1, points, caps, None), ran, best


def test_the_interval_of_a_race_holds_the_planted_critical_batch_as_often_as_the_grids(monkeypatch):
    """Coverage and bias of both, one rate for both nearly always, and under three quarters of the grid's steps."""
    monkeypatch.setattr("pybatch.sweep.summary.fit_steps", partial(fit_steps, resamples=100))  # as the fit's own tests
    rng, held, widths, agree, cost, logs = np.random.default_rng(0), {}, {}, 0, {}, {}
    for _ in range(REPEATS):
        steps = planted_curves(rng)
        best = {}
        for kind in ("grid", "race"):
            found, ran, best[kind] = fitted(kind, steps)
            inside = (found.low or 0) <= 100 <= (found.high or math.inf)
            held[kind] = held.get(kind, 0) + inside
            cost[kind] = cost.get(kind, 0) + ran
            logs.setdefault(kind, []).append(math.log(found.critical_batch / 100))
            widths.setdefault(kind, []).append(math.log((found.high or 1e4) / (found.low or 1)))
        agree += sum(a == b for a, b in zip(best["grid"], best["race"], strict=True))
    assert held["grid"] >= 0.91 * REPEATS
    assert held["race"] >= 0.91 * REPEATS
    assert abs(np.mean(logs["race"])) < 0.05
    assert np.mean(np.abs(np.subtract(logs["race"], logs["grid"]))) < 0.01
    assert np.median(widths["race"]) == pytest.approx(np.median(widths["grid"]), rel=0.1)
    assert agree >= 0.9 * REPEATS * len(BATCHES)
    assert cost["race"] < 0.75 * cost["grid"]


def bowl(lr):
    return round(100 * (1 + 0.5 * math.log(lr / 0.5) ** 2))


def raced(steps, cap=CAP, seeds=SEEDS):
    study, outcomes, proposals = play(Racing(Grid(RATES)), steps, 8, seeds, cap)
    return point(8, "train", study, outcomes), {(o.trial.lr, o.trial.seed): o for o in outcomes}, proposals


def test_rates_that_are_out_are_run_by_the_first_seed_alone():
    found, ended, proposals = raced(lambda lr, seed: bowl(lr) + seed)
    assert found.learning_rate == 0.5
    assert (found.reached, found.seeds, found.edge) == (3, 3, False)
    assert {seed for _, seed in proposals[0].runs} == {0}
    assert {lr for lr, seed in ended if seed == 0} >= set(RATES)
    assert {lr for lr, seed in ended if seed == 2} == {0.25, 0.353553, 0.5, 0.707107, 1.0}
    slow = next(r for r in found.rates if r.learning_rate == RATES[0])
    assert slow.statuses == ("not_reached", "not_run", "not_run")


def test_a_lucky_first_seed_does_not_put_the_others_rates_out():
    """At rate 8 it is done in 40 steps, where the other seeds diverge: no slower rate may have been ruled out by it."""
    found, ended, _ = raced(lambda lr, seed: (40 if seed == 0 else math.nan) if lr >= 8 else bowl(lr))
    assert found.learning_rate == 0.5
    assert found.reached == 3
    assert ended[0.5, 0].steps == 100  # given up at 60 first, then run on


def test_a_fast_first_seed_has_its_slower_rates_run_on():
    """Its best is 60, all else takes 100: rates given up at 90 are not known to be worse than the median of 100."""
    found, ended, _ = raced(lambda lr, seed: 60 if (lr, seed) == (2.0, 0) else 130 if lr == 2.0 else bowl(lr))
    assert found.learning_rate == 0.5
    assert found.steps == 100
    assert ended[0.5, 0].steps == 100


def test_a_target_out_of_reach_is_tried_by_all_seeds_at_one_rate():
    found, ended, _ = raced(lambda lr, seed: 10_000, cap=300)
    assert (found.status, found.steps, found.reached) == ("not_reached", None, 0)
    assert len(ended) == len(RATES) + 2
    assert all(o.steps == 300 for o in ended.values())


def test_rates_that_only_the_other_seeds_reach_are_found_where_the_first_came_nearest():
    found, _, _ = raced(lambda lr, seed: 10_000 if seed == 0 else 90, cap=300)
    assert (found.status, found.reached, found.steps) == ("reached", 2, 90)


def test_all_diverged_is_said_of_the_runs_that_were_made():
    found, ended, _ = raced(lambda lr, seed: math.nan)
    assert found.status == "diverged"
    assert found.diverged == len(ended) == len(RATES) + 2 * EXTENSIONS  # lower ones were tried
    assert min(rate for rate, _ in ended) < min(RATES)


@pytest.mark.parametrize("optimum", [0.001, 100.0])
def test_a_best_rate_beyond_the_grid_is_found_by_the_first_seed(optimum):
    found, _, proposals = raced(lambda lr, seed: round(100 * (1 + 0.5 * math.log(lr / optimum) ** 2)) + seed)
    assert abs(math.log2(found.learning_rate / optimum)) < 0.3
    assert all(seed == 0 for proposal in proposals[:-1] for _, seed in proposal.runs)


def test_one_seed_races_as_the_grid():
    study, outcomes, _ = play(Racing(Grid(RATES)), lambda lr, seed: bowl(lr), 8, (0,))
    grid, others, _ = play(Grid(RATES), lambda lr, seed: bowl(lr), 8, (0,))
    assert {o.trial.lr for o in outcomes} == {o.trial.lr for o in others}
    assert study.limits() == grid.limits()


def test_one_seeds_race_ends_with_whoever_is_first():
    """All go in step: who has not reached by then is not the best, and need not be trained on."""
    _, outcomes, _ = play(Racing(Grid(RATES)), lambda lr, seed: bowl(lr), 8, (0,))
    assert {o.steps for o in outcomes} == {100}
    _, outcomes, _ = play(Grid(RATES), lambda lr, seed: bowl(lr), 8, (0,))
    assert max(o.steps for o in outcomes) == 150


def test_of_several_seeds_the_best_rates_late_ones_are_waited_for_and_no_others():
    def steps(lr, seed):
        return bowl(lr) + (40 if seed == 2 else 0)

    found, ended, _ = raced(steps)
    assert (found.learning_rate, found.reached) == (0.5, 3)
    assert ended[0.5, 2].steps == 140
    assert ended[0.25, 2].steps == 120  # 100 is the least median


def test_what_was_given_up_is_censored_where_it_was(monkeypatch):
    seen = {}

    def fit(batches, table, **options):
        seen.update(options, steps=table)
        return fit_steps(batches, table, **options)

    monkeypatch.setattr("pybatch.sweep.summary.fit_steps", fit)
    points, caps, ran = [], {}, {}
    for batch in (8, 16, 32):
        study, outcomes, _ = play(Racing(Grid(RATES)), lambda lr, seed: bowl(lr) + (40 if seed == 2 else 0), batch)
        points.append(point(batch, "train", study, outcomes))
        caps[batch], ran[batch] = study.limit("train"), steps_of(outcomes, SEEDS)
    curve("tuned", "train", 0.1, points, caps, None, ran=ran)
    cells = [(i, j, k) for i, j, k in np.argwhere(np.isinf(seen["steps"])) if seen["rates"][i, j] == 0.25]
    assert {k for _, _, k in cells} == {1, 2}
    assert {seen["cap"][cell] for cell in cells} == {120}  # 1.2 times the least median, and not 1.5 times it
    late = [seen["cap"][i, j, k] for i, j, k in np.argwhere(seen["steps"] == 140) if seen["rates"][i, j] == 0.5]
    assert min(late) >= 140


@pytest.mark.parametrize("optimum", [0.5, 0.6, 3.0])
@pytest.mark.parametrize("off", [2**-6, 0.2, 1.0, 3.0, 2**6])
@pytest.mark.parametrize("seeds", [(0,), SEEDS])
def test_a_race_begun_near_an_expected_rate_finds_the_grids_best(optimum, off, seeds):
    def steps(lr, seed):
        away = math.log(lr / optimum)
        return math.nan if away > 2 else round(1000 * (1 + 0.5 * away**2))

    _, whole, _ = play(Racing(Grid(RATES)), steps, 8, seeds)
    study, some, proposals = play(Racing(Grid(RATES, optimum * off)), steps, 8, seeds)
    best = [best_rate(study, "train", sorted({o.trial.lr for o in each})) for each in (whole, some)]
    assert best[0] == best[1]
    assert 3 <= len({rate for rate, _ in proposals[0].runs}) <= 5
    if off == 1.0:
        assert sum(o.steps for o in some) < (0.75 if len(seeds) == 1 else 0.9) * sum(o.steps for o in whole)


def test_the_rates_tried_first_are_the_grids_own():
    assert Grid(RATES, 0.6).rates == [0.25, 0.5, 1.0, 2.0]
    assert Grid(RATES, 2.0**9).rates == [2.0**7, 2.0**8, 2.0**9]  # the grid goes on past its end
    assert Grid([0.001, 0.1, 10.0], 1.0).rates == [0.001, 0.1, 10.0]
    assert Grid([0.3], 5.0).rates == [0.3]  # of so few, all


def test_two_targets_have_their_own_contenders():
    """Test loss is best at another rate: both are run by all seeds."""

    def steps(lr, seed):
        return bowl(lr)

    search = Racing(Grid(RATES))
    first = search.propose(Study({"train": 0.1, "test": 0.2}, SEEDS, CAP))
    study = Study({"train": 0.1, "test": 0.2}, SEEDS, CAP)
    for lr, seed in first.runs:
        made = outcome(8, lr, seed, steps(lr, seed), CAP)
        study.take(made)
        study.found["test"].pop(lr)
        if lr == 8.0:
            study.record("test", lr, seed, study.found["train"][lr][seed])
    second = search.propose(study)
    assert {lr for lr, seed in second.runs if seed == 2} >= {0.5, 8.0}
    assert SURE > 1


def test_of_two_seeds_a_rate_that_one_alone_reaches_puts_no_other_out():
    """At 2.0 the first seed takes 60 and the second never gets there: 0.5, which both reach in 100, is better."""

    def steps(lr, seed):
        return (60 if seed == 0 else 10_000) if lr == 2.0 else bowl(lr)

    whole = point(8, "train", *play(Grid(RATES), steps, 8, (0, 1), 300)[:2])
    found, _, _ = raced(steps, 300, (0, 1))
    for each in (whole, found):
        assert (each.learning_rate, each.steps, each.reached) == (0.5, 100, 2)


def losing(grid, loss, seeds=(0,), cap=100, target=0.1, search=None):
    """Play a grid over final losses(lr); a run at or below the target reaches it at its last step."""
    ended = {}
    search = search or Racing(Grid(grid))
    while True:
        study = Study({"train": target}, seeds, cap)
        for each in ended.values():
            study.take(each)
        proposal = search.propose(study)
        if proposal is None:
            return study, ended
        for lr, seed in proposal.runs:
            trial = Trial("planted", "sgd", Scaled({"lr": lr}), 8, seed, "fp32", "cpu")
            last = loss(lr)
            end = "diverged" if math.isnan(last) else "met" if last <= target else "capped"
            ended[lr, seed] = Outcome(
                trial,
                end,
                made([0, cap - 2, cap - 1, cap], [1.0, 1.0, 1.0, -1e6] if last <= target else [last] * 4),
                0.0,
            )


@pytest.mark.parametrize("grid", [[0.008], [0.004, 0.008], [100.0], [200.0, 400.0]])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_grid_that_lies_elsewhere_moves_by_the_lowest_loss(grid, seeds):
    """Rates reach the target within an octave of 0.5; too high ones diverge."""

    def loss(lr):
        away = abs(math.log2(lr / 0.5))
        return math.nan if lr > 60 else 0.09 if away < 1 else 0.1 + 0.05 * away

    study, ended = losing(grid, loss, seeds)
    best = best_rate(study, "train", [lr for lr, _ in ended])
    assert best is not None
    assert abs(math.log2(best / 0.5)) < 1


@pytest.mark.parametrize(("slope", "says"), [(-1, "higher"), (1, "lower")])
def test_where_no_rate_reaches_it_says_where_to_go_on(slope, says):
    study, ended = losing([0.001, 0.002], lambda lr: 1 + 0.01 * slope * math.log2(lr))
    outcomes = list(ended.values())
    assert len(ended) == 2 + 2 * EXTENSIONS
    assert beyond("train", outcomes) == says
    end = max(ended)[0] if says == "higher" else min(ended)[0]
    assert nearest_rate(study, "train", [lr for lr, _ in ended]) == end
    assert f"the {'highest' if says == 'higher' else 'lowest'} rate tried there" in nearest("train", outcomes)
    found = curve("tuned", "train", 0.1, [point(8, "train", study, outcomes)], {8: 100.0}, None, (), says)
    assert any(f"Try {says} rates; or give a higher target, or more steps" in note.text for note in found.notes)


def test_a_loss_that_is_lowest_within_the_grid_asks_for_no_other_rates():
    _, ended = losing([0.1, 0.2, 0.4, 0.8], lambda lr: 0.3 + abs(math.log2(lr / 0.3)))
    assert len(ended) == 4
    assert beyond("train", list(ended.values())) is None


def sparse():
    return Racing(Grid(RATES, sparse=True))


@pytest.mark.parametrize(("optimum", "wall"), [(2 ** (k / 4), 8.0) for k in range(-4, 5)] + [(1.4, 1.6)])
def test_every_second_rate_first_finds_the_grids_best_by_fewer_steps(optimum, wall):
    """Rates beyond the wall diverge: where it hides the optimum from the first rates, it is found in a third turn."""

    def steps(lr, seed):
        away = math.log(lr / optimum)
        return math.nan if lr > wall else round(1000 * (1 + 0.5 * away**2))

    _, whole, _ = play(Racing(Grid(RATES)), steps, 8, (0,))
    _, some, proposals = play(sparse(), steps, 8, (0,))
    best = [min((steps(o.trial.lr, 0), o.trial.lr) for o in each if o.end == "met") for each in (whole, some)]
    assert best[0] == best[1]
    assert [rate for rate, _ in proposals[0].runs] == RATES[1::2]
    assert sum(o.steps for o in some) < (0.95 if wall > 2 else 1.05) * sum(o.steps for o in whole)


def test_the_only_rate_that_reaches_is_found_between_two_that_were_tried_first():
    """Reached within a twentieth of 1.03; elsewhere the loss at the end tells how far away that is."""
    study, ended = losing(RATES, lambda lr: 0.05 + abs(math.log(lr / 1.03)), search=sparse())
    assert 1.0 not in RATES[1::2]
    assert best_rate(study, "train", sorted({lr for lr, _ in ended})) == 1.0
    assert len({lr for lr, _ in ended}) <= 10


def test_of_uneven_rates_those_that_were_left_out_are_tried():
    rates, optimum = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], 2e-3
    search = Racing(Grid(rates, sparse=True))
    _, outcomes, _ = play(search, lambda lr, seed: round(1000 * (1 + math.log(lr / optimum) ** 2)), 8, (0,))
    tried = {o.trial.lr for o in outcomes}
    assert tried > {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}
    assert 1e-4 not in tried


@pytest.mark.parametrize(
    ("steps", "fitted"),
    [((200, 120, 60, 40, 2), 4), ((66, 23, 5, 1, 1), 3), ((4, 3, 2, 1, 1), 0), ((90, 50, 30, 20, 15), 5)],
)
def test_steps_of_four_or_fewer_bend_no_curve(steps, fitted):
    """66, 23, 5 and 1 steps gave "at least 256" and overruled a noise scale that was right."""
    points = [
        ConvergencePoint(
            8 * 4**i, float(n), "reached", 3, 0.1, reached=3, rates=(RateSteps(0.1, (n, n, n), ("reached",) * 3),)
        )
        for i, n in enumerate(steps)
    ]
    found = curve("tuned", "train", 0.1, points, dict.fromkeys((p.batch for p in points), 1000.0), None)
    assert (found.fit.batches if found.fit else 0) == fitted
    told = [
        note.text for note in found.notes if note.figure == "points" and "too coarse a count for the fit" in note.text
    ]
    assert len(told) == (fitted < 5)
    assert fitted or (found.critical_batch, found.low, found.high) == (None, None, None)
