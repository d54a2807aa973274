"""The options of a sweep: one object, whose keywords, JSON and identity say the same."""

import dataclasses
import json
from typing import get_type_hints

import pytest

from pybatch.sweep.options import EXTENDED, SweepKeywords, SweepOptions

GIVEN = SweepOptions(
    batches=[64, 4, 4],
    rules=["sqrt", "sqrt"],
    target={"test": 1, "train": 0.25},
    optimizer="AdamW",
    options={"betas": (0.8, 0.9)},
    rates=[0.3, 0.1, 0.30000001],
    base_rate=0.05656854249,
)


def test_keywords_of_python_are_its_fields():
    fields = {f.name for f in dataclasses.fields(SweepOptions)}
    assert set(get_type_hints(SweepKeywords)) == fields - {"batches", "rules", "seeds"}
    assert set(EXTENDED) < fields


def test_what_means_the_same_is_the_same():
    assert (GIVEN.batches, GIVEN.rules, GIVEN.optimizer) == ((4, 64), ("sqrt",), "adamw")
    assert (GIVEN.rates, GIVEN.base_rate) == ((0.1, 0.3), 0.0565685)
    assert list(GIVEN.targets.items()) == [("train", 0.25), ("test", 1.0)]
    assert (GIVEN.start_batch, GIVEN.seed_range, GIVEN.seeks) == (4, (0, 1, 2), False)


def test_json_reads_back():
    back = SweepOptions(**json.loads(json.dumps(GIVEN.to_dict())))
    assert back.to_dict() == GIVEN.to_dict()
    assert dataclasses.replace(back, options=GIVEN.options) == GIVEN


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SweepOptions)])
def test_options_that_a_later_sweep_may_add_to_make_no_other_experiment(name):
    others = {
        "batches": [8],
        "rules": ["constant"],
        "seeds": 5,
        "seed": 9,
        "target": {"train": 0.1},
        "optimizer": "sgd",
        "options": {},
        "rates": [0.1],
        "search": "grid",
        "base_batch": 8,
        "base_rate": 0.1,
        "max_steps": 7,
        "dtype": "bf16",
        "gap_epochs": 3.0,
        "schedule": "cosine",
        "beta2_rule": "half-life",
        "decay_rule": "linear",
    }
    other = dataclasses.replace(GIVEN, **{name: others[name]})
    assert (other.fixed == GIVEN.fixed) == (name in EXTENDED)
