"""Losses that are means over tokens: every source weighs by them, and the record has both units."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError, WorkloadError
from pybatch.fits.noise import pair
from pybatch.noise.feeds import HookFeed, OptimizerFeed
from pybatch.noise.groups import Tally
from pybatch.noise.hessian import HessianNoise
from pybatch.noise.measurement import measure_noise
from pybatch.noise.per_example.feed import ExampleFeed
from pybatch.optim import AdamW
from pybatch.records import CountedNoise, LayerNoise, NoiseScale, Run, WeightedNoise
from pybatch.report.formats.text import render
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session

D = 31
LENGTHS, CHANCES = (1, 16), (0.75, 0.25)
MEAN = 0.75 * 1 + 0.25 * 16
SQUARE = 0.75 * 1 + 0.25 * 256


class Ragged(Workload):
    """Padded sequences of x ~ N(0, I_31), weights half a unit off, a mean over tokens: B_simple = 32 tokens."""

    name = "ragged"
    reference_batch = 8
    tokens = D + 1

    def model(self):
        model = nn.Linear(D, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, n, generator, split="train"):
        lengths = torch.tensor(LENGTHS)[torch.multinomial(torch.tensor(CHANCES), n, True, generator=generator)]
        return self.draw(n, generator), torch.arange(max(LENGTHS)) < lengths[:, None]

    def draw(self, n, generator):
        return torch.randn(n, max(LENGTHS), D, generator=generator)

    def loss(self, model, batch):
        x, mask = batch
        error = 0.5 * (model(x)[..., 0] - 0.5 * x.sum(-1)).square()
        return (error * mask).sum() / mask.sum()

    def example_weights(self, batch):
        return batch[1].sum(1)


class Alike(Ragged):
    """All tokens of a sequence are the same one: the squared length counts, E[T^2] / E[T] in place of 1."""

    tokens = (D + 1) * SQUARE / MEAN

    def draw(self, n, generator):
        return torch.randn(n, 1, D, generator=generator).expand(-1, max(LENGTHS), -1)


class Uncounted(Ragged):
    """The same data, sequences counted as if they were alike."""

    def example_weights(self, batch):
        return None


pytestmark = pytest.mark.usefixtures("one_thread")


WAYS = {
    "micro-batches": {"micro_batch": 2},
    "hooks": {"micro_batch": 2, "preconditioned": True, "warmup_steps": 1, "hold": True},
    "per-example": {"micro_batch": 8, "source": "per-example"},
}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("way", WAYS)
def test_the_closed_form_in_both_units(way):
    options = {"device": "cpu", "warmup_steps": 0, "layers": True} | WAYS[way]
    found = [measure_noise(Ragged(), seed=seed, **options) for seed in range(3)]
    truth = Ragged.tokens / MEAN
    assert {f.status for f in found} == {"resolved"}
    assert sum(f.low <= truth <= f.high for f in found) >= 2
    assert np.mean([f.b_simple for f in found]) == pytest.approx(truth, rel=0.12)
    assert np.mean([f.counted.b_simple for f in found]) == pytest.approx(Ragged.tokens, rel=0.12)
    one = found[0]
    assert (one.unit, one.counted.unit) == (None, "tokens")
    assert one.counted.per_example == pytest.approx(MEAN, rel=0.25)
    assert one.counted.b_simple == pytest.approx(one.b_simple * one.counted.per_example)
    assert one.b_simple == pytest.approx(one.trace / one.grad_sq)
    assert one.small_batch == pytest.approx(SQUARE / MEAN**2 if way == "per-example" else 2, rel=0.25)
    assert any("differ in their tokens" in n.text for n in one.notes) == (way != "per-example")
    (layer,) = one.layers
    assert layer.b_simple == pytest.approx(one.b_simple, rel=1e-4)
    assert (layer.low, layer.high) == pytest.approx((one.low, one.high), rel=0.1)  # a shorter ring
    assert one.loss == pytest.approx(D / 8, rel=0.2)  # a mean over tokens too


def test_counting_examples_would_be_wrong():
    """The check above can fail: E[1/n] of two ragged sequences is three times 1/E[n]."""
    found = measure_noise(Uncounted(), device="cpu", warmup_steps=0, micro_batch=2)
    assert found.counted is None
    assert found.low > 2 * Ragged.tokens / MEAN


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("source", ["micro-batches", "per-example"])
def test_tokens_of_a_sequence_that_are_no_independent_draws(source):
    """In examples the scale is E[T^2] / E[T]^2 (d + 1): of sequences, not of tokens."""
    options = {"device": "cpu", "warmup_steps": 0, "micro_batch": 64, "source": source}
    found = [measure_noise(Alike(), seed=seed, **options) for seed in range(4)]
    assert np.mean([f.b_simple for f in found]) == pytest.approx(Alike.tokens / MEAN, rel=0.1)
    assert np.mean([f.b_simple for f in found]) > 2 * Ragged.tokens / MEAN


def possible(found):
    """The factor that the note on tokens gives; 1 without one."""
    text = " ".join(n.text for n in found.notes if "differ in their tokens" in n.text)
    return float(re.search("up to (.*) times", text)[1]) if text else 1.0


def test_what_the_note_on_alike_tokens_says():
    """Micro-batches of so few sequences read too little, by the factor that the note gives, and say what is right."""
    options = {"device": "cpu", "warmup_steps": 0, "micro_batch": 12}
    found = [measure_noise(Alike(), seed=seed, **options) for seed in range(4)]
    read, factor = (np.mean([f(n) for n in found]) for f in (lambda n: n.b_simple, possible))
    truth = Alike.tokens / MEAN
    assert read < 0.95 * truth
    assert factor > 1.05
    assert read * factor == pytest.approx(truth, rel=0.08)
    assert any("source='per-example' is right for both" in n.text for n in found[0].notes)


def test_tally_of_sequences_that_are_alike():
    """Of equal lengths nothing is lost; of unequal ones, alone in their micro-batches, the groups must be long."""
    tally = Tally()
    assert tally.alike(100.0, 4) == 1.0
    for _ in range(4):
        tally.add(torch.full((2,), 5.0, dtype=torch.float64))
    assert tally.alike(100.0, 4) == 1.0
    tally = Tally()
    for length in (1.0, 3.0):
        tally.add(torch.tensor([length], dtype=torch.float64))
    r = 2.0 / (10.0 / 4.0)  # E[T] over E[T^2] / E[T]
    assert tally.alike(10.0, 101) == pytest.approx(1 / ((101 * r - 1) / 100 - 10.0 * (1 - r) / 200.0))
    assert tally.alike(10.0, 2) == math.inf


def loop(batches, by_example):
    """|G|^2 and tr(Sigma), in tokens, from a float64 loop over tokens."""
    small, mean, tokens, squared = 0.0, torch.zeros(D, dtype=torch.float64), 0, 0
    power = 2 if by_example else 1
    for x, mask in batches:
        x, error = x.double(), -0.5 * x.double().sum(-1)
        grads = error[..., None] * x * mask[..., None]  # of each token's loss at weights of zero
        parts = [(grads.sum((0, 1)), int(mask.sum()))]
        if by_example:
            parts = [(g, int(m.sum())) for g, m in zip(grads.sum(1), mask, strict=True)]
        small += sum(float((g / n).square().sum()) * n**power for g, n in parts)
        squared += sum(n**power for _, n in parts)
        mean += grads.sum((0, 1))
        tokens += int(mask.sum())
    n_small = squared / tokens if by_example else tokens / len(batches)
    return pair(small / squared, float((mean / tokens).square().sum()), n_small, tokens), n_small, tokens


@pytest.mark.parametrize("feed", ["optimizer", "hooks", "per-example"])
def test_a_group_is_the_float64_loop_over_tokens(feed):
    """Micro-batches of unequal tokens: norms weighted by them, the mean over all tokens, both counts."""
    session = Session(Ragged(), torch.device("cpu"), seed=2)
    optimizer = AdamW(session.parameters, lr=0.0)
    made = {
        "optimizer": lambda: OptimizerFeed(session.model),
        "hooks": lambda: HookFeed(session.model, optimizer),
        "per-example": lambda: ExampleFeed(session.model),
    }[feed]()
    batches = [session.weighed_batch(5) for _ in range(3)]
    assert len({float(w.sum()) for _, w in batches}) > 1
    made.start()
    for batch, weights in batches:
        made.micro_batch(lambda scale=1.0, batch=batch: session.backward(batch, scale), 5, weights)
    made.group()
    found = made.noise
    expected, n_small, tokens = loop([b for b, _ in batches], feed == "per-example")
    assert (found.small_batch, found.large_batch) == pytest.approx((n_small, tokens))
    assert (found.grad_sq, found.trace) == pytest.approx(expected, rel=1e-4)


def test_curvature_counts_tokens():
    """H = I: tr(H Sigma) / G^T H G is B_simple again, where the weighted pairs are right."""
    session = Session(Ragged(), torch.device("cpu"), seed=1)
    noise = HessianNoise(session, 2, 2)
    for _ in range(200):
        noise.pair()
    found = noise.result
    assert found.low <= Ragged.tokens / MEAN <= found.high
    assert found.high < 2 * Ragged.tokens / MEAN


@pytest.mark.usefixtures("wide")
def test_equal_lengths_leave_the_scale_in_examples_as_it_was():
    """Text: all sequences alike, so that counting bytes changes only the unit."""
    text = type(find("text"))(length=16)
    options = {"device": "cpu", "warmup_steps": 0, "micro_batch": 2, "time_budget": 60}
    found = measure_noise(text, **options)
    text.example_weights = lambda batch: None
    plain = measure_noise(text, **options)
    assert found.b_simple == pytest.approx(plain.b_simple, rel=1e-5)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), rel=1e-4)
    assert (found.counted.unit, found.counted.per_example) == ("bytes", text.length)
    assert found.counted.low == pytest.approx(16 * plain.low, rel=1e-4)


TOKENS = NoiseScale(
    800.0, 400.0, 1600.0, 2.0, 1600.0, "resolved", "micro-batches", 40, 80.0, 320.0, unit="tokens",
    layers=(LayerNoise("w", 80.0, 1.0, 80.0, 40.0, None, "lower_bound", 40),),
    preconditioned=WeightedNoise(160.0, 80.0, 320.0, 1.0, 160.0, "resolved", 40),
)  # fmt: skip


def test_conversion():
    found = TOKENS.in_examples(8.0)
    assert (found.b_simple, found.low, found.high, found.trace) == (100.0, pytest.approx(50), pytest.approx(200), 200.0)
    assert (found.small_batch, found.large_batch, found.grad_sq, found.unit) == (10.0, 40.0, 2.0, None)
    assert found.counted == CountedNoise("tokens", 8.0, 800.0, 400.0, 1600.0)
    assert (found.layers[0].b_simple, found.layers[0].high) == (10.0, None)
    assert found.preconditioned.b_noise == 20.0
    # An uncertain mean widens the interval in quadrature: ln 2 and 1.96 x 0.2 on either side.
    wide = TOKENS.in_examples(8.0, error=0.2)
    width = math.hypot(math.log(2), 1.959964 * 0.2)
    assert (wide.low, wide.high) == pytest.approx((100 / math.exp(width), 100 * math.exp(width)))
    bound = dataclasses.replace(TOKENS, b_simple=None, high=None, status="lower_bound").in_examples(8.0, error=0.1)
    assert (bound.low, bound.high) == (pytest.approx(50 * math.exp(-0.1959964)), None)
    with pytest.raises(UsageError, match="in examples already"):
        found.in_examples(8.0)
    with pytest.raises(UsageError, match="mean tokens per example, above 0"):
        TOKENS.in_examples(0)


def test_the_verdict_is_in_examples():
    """Batch sizes are in examples: a scale in tokens is not compared with them, a converted one is."""
    refused, advised = advise(None, TOKENS), advise(None, TOKENS.in_examples(8.0))
    assert refused.critical_batch is None
    assert any("noise.in_examples(" in note.text for note in refused.notes)
    assert (advised.critical_batch, advised.critical_low) == (
        100.0,
        pytest.approx(21.2, rel=0.01),
    )  # 2 and 4 times either way
    assert advised.why("critical_batch").inputs["tokens per example"] == 8.0


def test_both_units_are_in_the_record_and_the_report(run):
    run = dataclasses.replace(run, noise=TOKENS.in_examples(8.0))
    assert Run.from_json(run.to_json()) == run
    assert "tokens, at 8 tokens per example" in " ".join(render(run, "table").split())


def test_tally():
    tally = Tally()
    assert (tally.mean, tally.error) == (None, 0.0)
    weights = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    tally.add(weights[:1])
    tally.add(weights[1:])
    assert tally.mean == 4.0
    assert tally.error == pytest.approx(float(weights.std(correction=0)) / 4.0 / 2.0)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (torch.ones(3), r"returned shape \(3,\): give one weight for each of the 8"),
        (3.0, "returned float"),
        (-torch.ones(8), "weights from -1 to -1"),
        (torch.zeros(8), "some above"),
    ],
)
def test_bad_weights_name_the_method(weights, says):
    work = Ragged()
    work.example_weights = lambda batch: weights[: len(batch[0])] if isinstance(weights, torch.Tensor) else weights
    with pytest.raises(WorkloadError, match=r"Ragged\.example_weights\(\).*" + says):
        measure_noise(work, device="cpu", warmup_steps=0)
