"""Sweeps in which nothing is planted, and sentences against their figures."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from cases.points import curve
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from pybatch.answer.claims import check_claims
from pybatch.answer.pairing import counts, fewer_reach
from pybatch.base import numerals as n
from pybatch.records import Convergence, ConvergencePoint, RateSteps, Run

BATCHES = (8, 16, 32, 64)


def point(batch, steps, test, train):
    known = sorted(s for s in steps if s is not None)
    status = "reached" if 2 * len(known) > len(steps) else "not_reached"
    rate = RateSteps(0.5, tuple(steps), tuple("reached" if s else "not_reached" for s in steps))
    return ConvergencePoint(
        batch, float(np.median(known)) if status == "reached" else None, status, len(steps), 0.5, reached=len(known),
        rates=(rate,), other_losses=tuple(t if s else None for t, s in zip(test, steps, strict=True)),
        test_losses_at_epochs=tuple(test), train_losses_at_epochs=tuple(train),
    )  # fmt: skip


def level(rng, seeds, spread, reach=1.0):
    """Three rules of the same steps, of which a doubling takes half, and losses that no batch size changes."""

    def one(rule):
        shape = (len(BATCHES), seeds)
        steps = 4e5 / np.array(BATCHES)[:, None] * np.exp(spread * rng.standard_normal(shape))
        met, test, train = rng.random(shape) < reach, rng.normal(1, 0.1, shape), rng.normal(0.5, 0.1, shape)
        rows = zip(BATCHES, np.where(met, steps, np.nan).tolist(), test.tolist(), train.tolist(), strict=True)
        return curve(rule, [point(b, [s if s > 0 else None for s in own], t, r) for b, own, t, r in rows])

    curves = one("tuned"), one("linear"), one("constant")
    return Run("", None, convergence=Convergence(curves, base_batch=4, gap_epochs=3.0, gap_steps=9))


@pytest.mark.parametrize(("seeds", "spread", "reach"), [(3, 0.1, 1.0), (3, 0.2, 0.75), (4, 0.8, 0.9)])
def test_where_nothing_is_planted_one_sweep_in_twenty_claims_something(seeds, spread, reach):
    """Of 120 draws at 5 %, the 99th percentile is 12."""
    rng, found = np.random.default_rng(0), Counter()
    for _ in range(120):
        for claim in check_claims(level(rng, seeds, spread, reach)):
            kept = ("yes",) if claim.name.endswith("fails") else ("yes", "no")  # that it holds is no false claim here
            found[claim.name] += claim.finding in kept and "level off" not in claim.name
    assert {name for name, count in found.items() if count > 12} == set()
    assert found["linear: gap"] + found["train cost rises"] + found["train, linear beats constant"] > 0


@pytest.mark.parametrize("rows", [[(0, 3, 3, 3)], [(1, 4, 3, 4)], [(2, 5, 5, 5)], [(3, 3, 3, 3)]])
def test_one_batch_size_is_fishers_exact_test(rows):
    a, runs, b, others = rows[0]
    assert fewer_reach(rows) == pytest.approx(fisher_exact([[a, runs - a], [b, others - b]], "less")[1])


def test_batch_sizes_add_up_by_their_products():
    rng = np.random.default_rng(0)  # 1 and 2 of 3 reach against 3 and 3: permuted within each batch size
    all_ = np.array([[1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    drawn = sum(rng.permuted(np.tile(row, (200_000, 1)), axis=1)[:, :3].sum(1) for row in all_)
    assert fewer_reach([(1, 3, 3, 3), (2, 3, 3, 3)]) == pytest.approx(np.mean(drawn <= 3), abs=0.004)


steps_ = st.one_of(st.none(), st.floats(2.0, 5e4))
losses_ = st.lists(st.floats(0.1, 9.0), min_size=3, max_size=3)
row_ = st.tuples(st.lists(steps_, min_size=3, max_size=3), losses_, losses_)
rows_ = st.lists(row_, min_size=len(BATCHES), max_size=len(BATCHES))


@given(st.tuples(rows_, rows_, rows_))
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
def test_no_sentence_says_more_than_its_figures(drawn):
    curves = [
        curve(rule, [point(b, *row) for b, row in zip(BATCHES, rows, strict=True)])
        for rule, rows in zip(("tuned", "linear", "constant"), drawn, strict=True)
    ]
    run = Run("", None, convergence=Convergence(tuple(curves), base_batch=4, gap_epochs=3.0, gap_steps=9))
    by_rule = {c.rule: c for c in curves}
    for claim in check_claims(run):
        if claim.finding == "not measured" or "level off" in claim.name:
            continue
        if claim.value is not None and claim.low is not None:
            assert n.interval(claim.low, claim.high) in claim.text
            assert n.number(claim.value) in claim.text or "as many steps" in claim.text
            assert claim.low <= claim.value <= claim.high
        if claim.name == "train cost rises":
            assert claim.finding != "yes" or claim.low > 1
            assert claim.finding != "no" or claim.high < 1
            assert_counted(claim.text, by_rule["tuned"])
        elif claim.name.endswith("fails"):
            at = re.search(r"fails at ([\d,]+): (\d of \d reach, 3 of 3 with|([\d.,]+) \[([\d.,e+]+))", claim.text)
            assert (claim.finding == "yes") == ("fails at" in claim.text)
            assert claim.finding != "no" or claim.high <= 2 + 1e-9
            if claim.finding == "yes" and claim.low is not None:
                assert at is None or claim.low > 2
        elif claim.name.endswith("beats constant"):
            assert claim.finding != "yes" or claim.low is None or claim.high < 1
            assert claim.finding != "no" or claim.low > 1
            assert_counted(claim.text, by_rule["linear"])
            assert_counted(claim.text, by_rule["constant"])
        elif "gap" in claim.name:
            assert claim.finding != "yes" or claim.low > 0
            assert claim.finding != "no" or claim.high < 0
            if "epochs" not in claim.name:
                assert_counted(claim.text, by_rule[claim.name.split(":")[0]])


def assert_counted(text, found):
    """Every batch size at which a seed is lost stands in the sentence, with its count."""
    said = {}
    for reached, ran, batches in re.findall(r"(\d) of (\d) at (\d+(?:, \d+)*)", text):
        for batch in batches.split(", "):
            said.setdefault(int(batch), set()).add((int(reached), int(ran)))
    for p in found.points:
        reached, ran = counts(p)
        if reached < ran:
            assert (reached, ran) in said.get(p.batch, set()), (text, p.batch)


def test_an_interval_of_one_seed_is_open():
    found = {c.name: c for c in check_claims(level(np.random.default_rng(0), 1, 0.1))}
    assert {c.finding for name, c in found.items() if "level off" not in name} <= {"undetermined", "not measured"}
    assert "one seed: no interval" in found["train cost rises"].text
    assert not any(math.isinf(c.low or 0) for c in found.values())
