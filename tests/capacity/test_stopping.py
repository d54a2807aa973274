"""The median's interval by coverage; the stopping rule; rounds with planted times; FLOPs by closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import sdpa_flop_count

from pybatch.capacity.flops import count_flops
from pybatch.capacity.stopping import StoppingRule, median
from pybatch.capacity.timing import Rounds, Series
from pybatch.device.clock import Clock


def coverage(draw: object, n: int, truth: float, repeats: int = 400) -> float:
    hits = 0
    for seed in range(repeats):
        found = median(draw(np.random.default_rng(seed), n))  # type: ignore[operator]
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    return hits / repeats


def independent(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(rng.normal(0, 0.1, n))


def correlated(rng: np.random.Generator, n: int) -> np.ndarray:
    """Log step times that wander: first-order autoregressive, correlation 0.9 from step to step."""
    noise, x = rng.normal(size=n), np.empty(n)
    x[0] = noise[0]
    for i in range(1, n):
        x[i] = 0.9 * x[i - 1] + np.sqrt(1 - 0.81) * noise[i]
    return np.exp(0.1 * x)


@pytest.mark.parametrize("n", [6, 10, 39, 400])
def test_the_interval_holds_the_median_of_independent_steps(n: int) -> None:
    assert coverage(independent, n, 1.0) >= 0.93


def test_blocks_keep_the_interval_honest_for_steps_that_are_not_independent() -> None:
    assert coverage(correlated, 1000, 1.0) >= 0.90

    def naive(rng: np.random.Generator, n: int) -> bool:
        ordered = np.sort(correlated(rng, n))
        return bool(ordered[468] <= 1.0 <= ordered[531])  # 95 % order statistics of 1000 independent values

    # Mutation: without blocks the same steps would be covered far too rarely.
    assert np.mean([naive(np.random.default_rng(seed), 1000) for seed in range(200)]) < 0.5


def test_too_few_steps_have_no_interval() -> None:
    found = median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.value, found.low, found.high) == (3.0, None, None)
    assert found.relative_error == np.inf


@pytest.mark.parametrize(
    ("count", "seconds", "errors", "why"),
    [
        (9, 1.0, [0.001], None),  # too few steps
        (100, 0.4, [0.001], None),  # too short
        (100, 0.6, [0.004], "steady"),
        (100, 0.6, [0.02], None),
        (100, 2.0, [0.02, 0.018, 0.0175, 0.0172], None),  # still improving: more than 5 % in three looks
        (100, 2.0, [0.02, 0.0199, 0.0198, 0.0197], "no longer improving"),
        (3, 9.0, [0.5], "timeout"),
    ],
)
def test_the_rule_stops_when_it_should(count: int, seconds: float, errors: list[float], why: str | None) -> None:
    assert StoppingRule(max_seconds=8.0).met(count, seconds, errors) == why


class PlantedClock(Clock):
    """A step of n examples takes alpha + beta n seconds, times what `disturb` says; nothing really waits."""

    def __init__(self, alpha: float = 1e-3, beta: float = 1e-5, spread: float = 0.01, seed: int = 0) -> None:
        self.alpha, self.beta, self.spread, self.time_s = alpha, beta, spread, 0.0
        self.rng = np.random.default_rng(seed)
        self.batch = 0
        self.visits: list[int] = []
        self.disturb = lambda now: 1.0

    def load(self, n: int) -> None:
        self.batch = n
        self.visits.append(n)

    def time(self, work: object, count: int) -> list[float]:
        base = (self.alpha + self.beta * self.batch) * self.disturb(self.time_s)
        times = [float(base * np.exp(self.rng.normal(0, self.spread))) for _ in range(count)]
        self.time_s += sum(times)
        return times

    def now(self) -> float:
        return self.time_s


def rounds(clock: PlantedClock, rule: StoppingRule | None = None) -> Rounds:
    region = SimpleNamespace(
        device=torch.device("cpu"),
        start=lambda: None,
        look=lambda: None,
        stop=lambda: None,
        estimated=lambda reading, *_: reading,
    )
    return Rounds(clock.load, lambda: None, lambda: None, clock, region, rule or StoppingRule(), 0)  # type: ignore[arg-type]


def guesses(clock: PlantedClock, batches: list[int]) -> dict[int, float]:
    return {n: clock.alpha + clock.beta * n for n in batches}


def test_every_batch_is_timed_to_the_rule_in_shuffled_order() -> None:
    clock, batches = PlantedClock(), [1, 4, 16, 64, 256, 1024]
    found = rounds(clock)
    found.run(guesses(clock, batches), deadline=100.0)
    for n, series in found.series.items():
        assert series.stopped == "steady"
        assert len(series.seconds) >= 10
        assert sum(series.seconds) >= 0.5
        assert series.median.value == pytest.approx(clock.alpha + clock.beta * n, rel=0.01)
    assert clock.visits[0] == clock.visits[-1]  # the anchor opens and closes the run
    assert sorted(set(clock.visits)) == batches
    assert clock.visits[1:7] != sorted(clock.visits[1:7])
    assert found.drift == pytest.approx(0.0, abs=0.02)


def test_drift_is_the_anchors_change() -> None:
    clock = PlantedClock()
    clock.disturb = lambda now: 1.0 if now < 1.0 else 1.2
    found = rounds(clock)
    found.run(guesses(clock, [1, 8, 64]), deadline=100.0)
    assert found.drift == pytest.approx(0.2, abs=0.02)


def test_a_short_budget_is_kept_and_spread_over_the_batches() -> None:
    clock = PlantedClock(spread=0.3)
    found = rounds(clock, StoppingRule(relative_error=1e-9, patience=10**6))
    found.run(guesses(clock, [1, 8, 64, 512]), deadline=3.0)
    assert clock.now() <= 3.3
    seconds = [sum(s.seconds) for s in found.series.values()]
    assert all(s.stopped is None for s in found.series.values())
    assert max(seconds) < 3 * min(seconds)


def test_a_sudden_disturbance_does_not_carry_a_visit_far_past_the_deadline() -> None:
    clock = PlantedClock()
    clock.disturb = lambda now: 1.0 if now < 0.2 else 200.0  # 0.2 s a step
    found = rounds(clock)
    found.run(guesses(clock, [1, 2, 4]), deadline=2.0)
    assert clock.now() < 2.0 + 60 * 0.2  # one chunk of the steps planned before; a whole visit would take 50 s


def test_linear_layers_count_two_flops_per_weight_and_example_and_twice_that_backward() -> None:
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    x = torch.randn(11, 5)
    flops, reason = count_flops(lambda: second(first(x)).sum().backward())
    # The first layer needs no gradient of its input.
    assert flops == 11 * (2 * 2 * 5 * 7 + 3 * 2 * 7 * 3)
    assert reason is None


def test_attention_on_a_cpu_counts_what_torchs_formula_gives_for_a_gpu() -> None:
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    flops, reason = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    shape = q.shape
    assert flops == 3 * sdpa_flop_count(shape, shape, shape)  # the scores formed again backward are no model FLOPs
    assert reason is None


def test_recurrent_layers_count_their_gate_matrices_at_every_position() -> None:
    layers = nn.LSTM(6, 8, num_layers=2, batch_first=True)
    x = torch.randn(3, 10, 6, requires_grad=True)
    flops, reason = count_flops(lambda: layers(x)[0].sum().backward())
    gates = 4 * 8 * (6 + 8) + 4 * 8 * (8 + 8)
    assert flops == 3 * 2 * 3 * 10 * gates
    assert reason is None


def test_an_operator_without_a_formula_makes_the_count_null_not_wrong() -> None:
    x = torch.randn(8, 8)
    flops, reason = count_flops(lambda: torch.linalg.solve(x @ x, x))
    assert flops is None
    assert reason is not None
    assert "linalg" in reason


def test_custom_operators_are_named() -> None:
    library = torch.library.Library("pybatch_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    flops, reason = count_flops(lambda: torch.ops.pybatch_test.twice(torch.ones(2)))
    assert flops == 0
    assert reason == "custom operators count nothing: pybatch_test.twice"


def test_blocks_know_their_round() -> None:
    series = Series(8, 1e-3, seconds=[1.0] * 100, visits=[(0, 30), (2, 50), (3, 20)])
    assert len(series.blocks) == len(series.block_rounds) == 20
    assert series.block_rounds == [0] * 6 + [2] * 10 + [3] * 4
    few = Series(8, 1e-3, seconds=[1.0] * 5, visits=[(1, 3), (4, 2)])
    assert few.block_rounds == [1, 1, 1, 4, 4]
    assert Series(8, 1e-3).block_rounds == []


def test_rounds_are_counted_over_all_batch_sizes() -> None:
    clock = PlantedClock()
    run = rounds(clock)
    run.run({8: 1e-3, 16: 2e-3, 32: 4e-3}, clock.now() + 1e9)
    turns = {n: [turn for turn, _ in series.visits] for n, series in run.series.items()}
    assert turns[16][0] == 0  # the anchor's first visit comes before the rounds
    assert all(turn == sorted(set(turn)) for turn in turns.values())
    assert {turns[n][0] for n in (8, 32)} == {1}
    assert all(sum(count for _, count in s.visits) == len(s.seconds) for s in run.series.values())
