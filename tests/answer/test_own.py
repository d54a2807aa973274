"""What is said of a watched script's own batch."""

from dataclasses import replace

import pytest
from cases.verdicts import capacity, noise, numbers_in, unaccounted

from pybatch.answer.own import with_own
from pybatch.answer.verdict import advise, ensemble
from pybatch.records import Training

TRAINING = Training(
    name="train.py", model="Net", optimizer="SGD", wrapped=(), batch=4, micro_batch=4, accumulation=1, devices=1,
    steps=100, step_ms=10.0, step_ms_low=None, step_ms_high=None, samples_per_s=400.0,
)  # fmt: skip


def told(training, scale=120):
    given = capacity(), noise(scale)
    plain = advise(*given)
    return plain, with_own(plain, *given, training)


def test_the_own_batch_has_its_rate_and_its_time_beside_the_one_advised():
    plain, found = told(TRAINING)
    rates = {p.batch: p.samples_per_s for p in capacity().batches}
    model, inputs = ensemble(capacity(), noise(120), None), found.why("own_batch").inputs
    assert inputs["rate_percent"] == pytest.approx(100 * rates[4] / max(rates.values()))
    # Of batches that were timed the measured step times are taken, which here lie on the model's.
    assert inputs["time_factor"] == pytest.approx(model.time(4.0) / model.time(float(plain.best_batch)), rel=0.05)
    assert inputs["time_factor_low"] < inputs["time_factor"] < inputs["time_factor_high"]
    sentence = found.text.removeprefix(plain.answer).removesuffix(plain.text.removeprefix(plain.answer)).strip()
    assert sentence.startswith("The script's own batch 4 has ")
    assert sentence.endswith(f"the time of batch {plain.best_batch} to the same loss.")
    assert found.because == f"{sentence} {plain.because}"
    assert found.answer == plain.answer
    assert unaccounted(found) == set()
    assert len(numbers_in(sentence)) == 7


def test_the_one_advised_is_said_to_be_it():
    plain, _ = told(TRAINING)
    own = replace(TRAINING, batch=plain.best_batch, micro_batch=plain.best_batch)
    found = told(own)[1]
    assert found.because.startswith(f"The script's own batch {plain.best_batch} has ")
    assert ", and is the one advised. " in found.because
    assert "time_factor" not in found.why("own_batch").inputs


def test_of_several_passes_a_step_the_rate_of_a_pass_is_told_alone():
    found = told(replace(TRAINING, batch=16, accumulation=4))[1]
    assert found.because.startswith("The script's own passes of 4 have ")
    assert "same loss" not in found.because.split(". ")[0]


def test_what_was_not_replayed_is_not_told():
    plain, found = told(replace(TRAINING, batch=5, micro_batch=5))
    assert found == plain
