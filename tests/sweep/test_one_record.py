"""A sweep has one record: what it returns is what its store says, cut and resumed included, and one report shows."""

import contextlib
import dataclasses
import json
import sqlite3

import pytest
from cases.planted_training import planted_training
from cases.sweeps import Isotropic
from hypothesis import given, settings
from hypothesis import strategies as st

from pybatch.answer.merge import join
from pybatch.base.errors import Interrupted, UsageError
from pybatch.records import Environment, NoiseScale, Run
from pybatch.sweep.archive import read_store
from pybatch.sweep.driver import Sweep
from pybatch.sweep.measurement import measure_sweep
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.store import Store

HERE = Environment("3.11", "Linux", "0", "2.13", None, None, None, 1, 0, "test")
NOISE = NoiseScale(16.0, 14.0, 18.0, 1.0, 16.0, "resolved", "test", 100)


@st.composite
def sweeps(draw):
    """Options of a small sweep that can work, and how many trials it runs before it is cut."""
    batches = draw(st.lists(st.sampled_from([4, 8, 16, 64]), min_size=1, max_size=3, unique=True))
    rules = draw(
        st.lists(st.sampled_from(["tuned", "constant", "sqrt", "linear"]), min_size=1, max_size=3, unique=True)
    )
    base_rate = draw(st.sampled_from([None, None, 0.03, 0.0565685, 0.05656854249])) if rules != ["tuned"] else None
    return {
        "batches": batches,
        "rules": rules,
        "seeds": draw(st.integers(1, 3)),
        "seed": draw(st.sampled_from([0, 7])),
        "target": draw(st.sampled_from([{"train": 0.2}, {"train": 0.1, "test": 0.3}, {"test": 0.2}, {"train": 0.001}])),
        "rates": draw(st.lists(st.sampled_from([0.01, 0.02, 0.04, 0.08, 0.3, 2.0]), min_size=1, max_size=4)),
        "search": draw(st.sampled_from(["race", "race", "grid", "tpe"])),
        "base_batch": draw(st.sampled_from([None, None, 8])),
        "base_rate": base_rate,
        "max_steps": draw(st.sampled_from([40, 100, 400])),
        "gap_epochs": draw(st.sampled_from([None, None, 1.6, 4.0])),
    }


def swept(options, path=None, noise=None):
    """The record of a sweep, of which every finished cell says what its trials said while it ran."""
    asked, own, cells = SweepOptions(**options), Sweep.record, []

    def seen(self):
        cells.extend(self.cells)
        return own(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "record", seen)
        run = measure_sweep(Isotropic(), asked, device="cpu", store=path, resume=True, noise=noise, environment=HERE)
    points = {(c.rule, c.split, p.batch): p for c in run.convergence.curves for p in c.points}
    for cell in cells if run.convergence.seeds == asked.seeds else ():
        for split, at_its_end in ({} if cell.failed else cell.points(asked.seed_range)).items():
            if (cell.rule, split, cell.batch) in points:
                point = points[cell.rule, split, cell.batch]
                assert [rate.learning_rate for rate in point.rates] == [r.learning_rate for r in at_its_end.rates]
                assert (point.steps, point.learning_rate) == (at_its_end.steps, at_its_end.learning_rate)
    return run


def trained(path):
    """What distinguishes the trainings of a store, their rates to five digits."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        specs = [json.loads(spec) for (spec,) in db.execute("SELECT spec FROM trial")]
    scaled = [spec["scaled"] for spec in specs]
    rates = [(f"{s['group']['lr']:.5g}", s["warmup_steps"], f"{s['warmup_from']:.5g}") for s in scaled]
    return [(spec["batch"], spec["seed"], rate) for spec, rate in zip(specs, rates, strict=True)]


def bare(run):
    """A run without what names its store, and without times."""
    return dataclasses.replace(
        run, created="", convergence=dataclasses.replace(run.convergence, experiment=None, changed=None)
    )


def cut_after(monkeypatch, count, stored, options, path, noise=None):
    """The record of a sweep interrupted at its trial of this number, before or after that is stored; None: it ended."""
    put, seen = Store.put, []

    def interrupted(self, outcome):
        seen.append(outcome)
        if len(seen) > count and not stored:
            raise KeyboardInterrupt
        put(self, outcome)
        if len(seen) > count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        try:
            swept(options, path, noise)
        except Interrupted as stop:
            return stop.partial
    return None


@settings(derandomize=True, max_examples=16, deadline=None, database=None)
@given(sweeps(), st.integers(0, 60), st.booleans(), st.sampled_from([None, NOISE]))
def test_what_a_sweep_returns_is_what_its_store_says(tmp_path_factory, options, count, stored, noise):
    folder, monkeypatch = tmp_path_factory.mktemp("sweeps"), pytest.MonkeyPatch()
    with planted_training(monkeypatch):
        try:
            whole = swept(options, folder / "whole.db", noise)
        except UsageError:  # a budget of epochs that these batches cannot spend
            assert options["gap_epochs"] is not None
            return
        assert read_store(folder / "whole.db") == [whole]
        assert len(runs := trained(folder / "whole.db")) == len(set(runs))  # one rate has one key
        assert bare(swept(options, None, noise)) == bare(whole)
        partial = cut_after(monkeypatch, count, stored, options, folder / "cut.db", noise)
        if partial is not None:
            assert read_store(folder / "cut.db") == [partial]
            assert not partial.complete
        resumed = swept(options, folder / "cut.db", noise)
        assert read_store(folder / "cut.db") == [resumed]
        assert bare(resumed) == bare(whole)
        for states in ([whole, *read_store(folder / "whole.db")], [Run.from_json(whole.to_json()), whole]):
            assert len(join(states)) == 1
        if partial is not None:
            assert join([partial, resumed]) == join([resumed, partial]) == [resumed]


def tried(run):
    """The rates behind every tuned point."""
    tuned = [(curve.split, curve.points) for curve in run.convergence.curves if curve.rule == "tuned"]
    return [(split, p.batch, [rate.learning_rate for rate in p.rates]) for split, points in tuned for p in points]


@settings(derandomize=True, max_examples=12, deadline=None, database=None)
@given(st.lists(sweeps(), min_size=2, max_size=3), st.booleans())
def test_sweeps_share_a_store_and_not_their_searches(tmp_path_factory, several, same):
    """Each returns what the store says of its experiment; rates that other experiments tried enter none of its points.

    A trial that they ran on does count in full: where a run was given up says nothing against its later steps.
    """
    path, monkeypatch, known = tmp_path_factory.mktemp("sweeps") / "runs.db", pytest.MonkeyPatch(), {}
    with planted_training(monkeypatch):
        for options in several:
            if same:  # with more batch sizes, rules, seeds, steps or epochs
                options = options | {name: several[0][name] for name in ("rates", "search", "target", "seed")}
                options |= {"base_batch": 8, "base_rate": None}
            with contextlib.suppress(UsageError):
                run = swept(options, path)
                known[run.convergence.experiment] = run
                assert run in read_store(path)
        read = {run.convergence.experiment: run for run in read_store(path)} if known else {}
        assert {name: tried(run) for name, run in read.items()} == {name: tried(run) for name, run in known.items()}
        assert len(known) <= 1 or not same


def test_a_rate_that_a_rule_and_a_search_reach_by_other_arithmetic_is_trained_once(tmp_path, monkeypatch):
    """0.04 times the root of 2, and halfway between 0.04 and 0.08."""
    path = tmp_path / "runs.db"
    options = {"batches": [8, 16], "rules": ["tuned", "sqrt"], "seeds": 1, "target": {"train": 0.2}}
    with planted_training(monkeypatch):
        run = swept(options | {"rates": [0.04, 0.08, 0.16], "base_rate": 0.04}, path)
    tuned, sqrt = (curve.points[1] for curve in run.convergence.curves)
    assert sqrt.learning_rate == 0.0565685
    assert sqrt.learning_rate in [rate.learning_rate for rate in tuned.rates]
    assert len(runs := trained(path)) == len(set(runs))
