"""The largest batch: the plan, the search when it does not fit, and the fresh process it runs in."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from pybatch.base.errors import WorkloadError
from pybatch.capacity import largest, probe
from pybatch.capacity.exploration import Explorer, Look
from pybatch.capacity.largest import Largest, Prediction, predict_largest, verify_largest
from pybatch.capacity.probe import Outcome, Request
from pybatch.capacity.step import TrainingStep
from pybatch.device.clock import WallClock
from pybatch.device.memory import PeakMemory
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.packing import pack
from pybatch.workloads.running.session import Session

CPU = torch.device("cpu")
MB = 1_000_000


@pytest.fixture(autouse=True)
def _fresh_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check costs, and so which batch is tried, must not depend on what else this machine does."""
    monkeypatch.setattr(largest, "_fresh_bytes_per_s", lambda: 4e9)


class Wide(Workload):
    """Memory of about 8 kB per example; fails in a fresh process where `fault` says so."""

    name = "wide"

    def __init__(self, fault: bool = False) -> None:
        self.fault = fault

    def model(self) -> nn.Module:
        print("a workload may print")
        return nn.Linear(1000, 1)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, 1000, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if self.fault and len(batch) > 1:
            raise KeyError("only here")
        loss: torch.Tensor = model(batch * 2).square().mean()
        return loss


def explorer(work: Workload | None = None, *, step_s: float = 1e-5, per_example: float = 0.01 * MB) -> Explorer:
    """An explorer that has looked at some batches: 1 MB + 10 kB and 10 us per example."""
    found = Explorer(TrainingStep(Session(work or Wide(), CPU)), WallClock(), PeakMemory(CPU), None)
    for n in (1, 8, 64, 512):
        found.looks[n] = Look(n, "ok", None, step_s * n, int(1 * MB + per_example * n), 1)
    return found


def plan_of(found: Explorer, limit: int) -> Prediction:
    plan = predict_largest(found, limit, found.clock.now() + 1.0)
    assert isinstance(plan, Prediction)
    return plan


class Process:
    """A fresh process in which batches up to `fits` run."""

    def __init__(self, fits: int) -> None:
        self.fits, self.tried = fits, list[int]()

    def __call__(self, request: Request, timeout_s: float) -> Outcome:
        self.tried.append(request.batch)
        return Outcome("ok", 3) if request.batch <= self.fits else Outcome("oom", reason="MemoryError")


def test_the_plan_extrapolates_the_line_of_memory_to_just_below_the_limit() -> None:
    plan = plan_of(explorer(), 101 * MB)
    assert plan.candidate == int((101 * MB * 0.97 - 1 * MB) / 10_000)
    assert "50% of available host memory" in plan.notes[0].text


def test_a_batch_that_ran_in_a_fresh_process_is_verified() -> None:
    found, process = explorer(), Process(10**9)
    plan = plan_of(found, 101 * MB)
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 100, process)
    assert (result.batch, result.verified) == (plan.candidate, True)
    assert process.tried == [plan.candidate]


def pairwise(batches: tuple[int, ...] = (512, 1024, 2048, 4096)) -> Explorer:
    """An explorer of a workload that keeps four float32 matrices of batch x batch, beside 10 kB per example."""
    found = explorer()
    found.looks = {n: Look(n, "ok", None, 1e-5 * n, 1 * MB + 10_000 * n + 16 * n**2, 1) for n in batches}
    return found


def test_memory_that_grows_quadratically_is_predicted_so_with_a_note() -> None:
    limit = 20_000 * MB
    plan = plan_of(pairwise(), limit)
    assert plan.candidate == pytest.approx(math.sqrt((0.97 * limit) / 16), rel=0.02)
    text = plan.notes[-1].text
    assert f"a quadratic predicts {plan.candidate}, 8.4 times the largest that ran; a line would say " in text
    assert int(text.split()[-1]) > 5 * plan.candidate


def test_a_quadratic_not_verified_is_said_to_be_one() -> None:
    found = pairwise()
    result = verify_largest(found, plan_of(found, 20_000 * MB), 20_000 * MB, found.clock.now() + 1.0, Process(10**9))
    assert not result.verified
    assert "a quadratic of memory up to batch 4096 predicts it, 8.4 times further" in result.notes[-1].text


def test_a_quadratic_keeps_a_batch_from_being_run_that_a_line_would_let_run() -> None:
    found = pairwise()
    found.memory_limit = 2_000 * MB
    assert found.excess(10_000) is None  # 1.7 GB
    assert found.excess(12_000) == "predicted 2.26 GiB, limit 1.86 GiB"  # a line would say 0.97 GiB


def test_memory_that_neither_explains_is_said_to_be_so() -> None:
    """Peaks of a contrastive loss on a CPU, where the C library kept freed blocks at batch 2048."""
    found = explorer()
    measured = {1024: 43, 2048: 155, 4096: 206, 8192: 795}
    found.looks = {n: Look(n, "ok", None, 1e-5 * n, peak << 20, 1) for n, peak in measured.items()}
    text = plan_of(found, 16 << 30).notes[-1].text
    assert "neither a line nor a quadratic explains peak memory over batches up to 8192" in text
    assert "spreads over 162 MiB" in text
    assert len(plan_of(explorer(), 101 * MB).notes) == 1  # a line that explains them needs no such note


def test_what_ran_stands_where_a_quadratic_says_less() -> None:
    assert plan_of(pairwise(), 100 * MB).candidate == 4096


@pytest.mark.parametrize("fits", [9000, 6000, 512])
def test_a_batch_that_does_not_fit_is_stepped_down_to_one_that_does(fits: int) -> None:
    found, process = explorer(), Process(fits)
    plan = plan_of(found, 101 * MB)
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 100, process)
    assert process.tried == sorted(process.tried, reverse=True)
    assert result.batch is not None
    if result.verified:
        assert result.batch <= fits
    else:
        assert fits < process.tried[-1]
        assert "did not run" in result.notes[-1].text


def test_a_line_that_failed_twice_is_bent_by_what_curvature_there_is() -> None:
    """Peaks of a contrastive loss on a CPU: 17 bytes a pair show by less than an allocator's steps up to batch 1024."""
    found, process = explorer(), Process(26_000)
    found.looks = {
        n: Look(n, "ok", None, 1e-5 * n, int(9 * MB + 8_000 * n + 17 * n**2), 1) for n in (128, 256, 512, 1024)
    }
    limit = 12_000 * MB
    plan = plan_of(found, limit)
    assert plan.candidate > 15 * 26_000
    result = verify_largest(found, plan, limit, found.clock.now() + 1e6, process)
    assert result.verified
    assert len(process.tried) == 3
    assert 0.95 * 26_000 < result.batch <= 26_000


def test_without_time_the_prediction_stands_unverified_with_the_reason() -> None:
    found, process = explorer(), Process(10**9)
    plan = plan_of(found, 101 * MB)
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 1.0, process)
    assert (result.batch, result.verified, process.tried) == (plan.candidate, False, [])
    assert "were left" in result.notes[-1].text


def test_a_step_of_more_than_ten_seconds_is_not_run() -> None:
    found, process = explorer(step_s=0.1), Process(10**9)
    plan = plan_of(found, 101 * MB)
    assert math.isinf(largest.needed_s(found, plan.candidate, 101 * MB))
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 1e6, process)
    assert (result.verified, process.tried) == (False, [])


class Measured(Process):
    """A fresh process that reports a peak of 1 MB, `per_example` and `per_pair` bytes, and remembers what ran in it."""

    def __init__(self, per_example: float, status: Literal["ok", "oom"] = "ok", per_pair: float = 0.0) -> None:
        super().__init__(10**9)
        self.per_example, self.status, self.per_pair = per_example, status, per_pair

    def __call__(self, request: Request, timeout_s: float) -> Outcome:
        super().__call__(request, timeout_s)
        peak = int(1 * MB + self.per_example * request.batch + self.per_pair * request.batch**2)
        return Outcome(self.status, 3, peak if self.status == "ok" else None, reason="MemoryError")


@pytest.mark.parametrize(("per_example", "says"), [(10_000.0, "+0.0% against"), (12_000.0, "against the prediction")])
def test_where_the_largest_takes_too_long_a_smaller_one_checks_the_prediction(per_example: float, says: str) -> None:
    found, process = explorer(step_s=0.002), Measured(per_example)  # 19 s for the largest, 9.7 s for half of it
    plan = plan_of(found, 101 * MB)
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 12.0, process)
    assert not result.verified
    (tried,) = process.tried
    assert 2 * 512 <= tried <= plan.candidate // 2
    assert found.predicted_s(tried) < 12 - 5
    assert f"batch {tried} ran in a fresh process" in result.notes[-1].text
    assert says in result.notes[-1].text
    if per_example == 10_000:
        assert result.batch == plan.candidate
        return
    assert "+1" in result.notes[-1].text  # about a fifth more than predicted
    assert f"with it {result.batch} is predicted in place of {plan.candidate}" in result.notes[-1].text
    assert result.batch is not None
    assert 0.9 * plan.candidate < result.batch * per_example / 10_000 <= plan.candidate


@pytest.mark.parametrize(("square", "within"), [(0.5, 2.1), (16.0, 1.1)])
def test_a_check_that_took_more_bends_the_prediction(square: float, within: float) -> None:
    """What is quadratic far out need not show in small batches, which alone read 3.7 and 18 times too high here."""
    limit, own = 2_000 * MB, explorer(step_s=1e-3)
    process = Measured(10_000, per_pair=square)
    plan = plan_of(own, limit)
    result = verify_largest(own, plan, limit, own.clock.now() + 20.0, process)
    truth = (math.sqrt(10_000**2 + 4 * square * (0.97 * limit - 1 * MB)) - 10_000) / (2 * square)
    assert not result.verified
    assert plan.candidate > 1.3 * truth
    assert result.batch is not None
    assert max(process.tried[0], 0.85 * truth) <= result.batch <= within * truth


def test_a_smaller_one_that_does_not_run_is_told() -> None:
    found = explorer(step_s=0.002)
    plan = plan_of(found, 101 * MB)
    result = verify_largest(found, plan, 101 * MB, found.clock.now() + 12.0, Measured(10_000, "oom"))
    text = result.notes[-1].text
    assert "to check the prediction, did not run in a fresh process (MemoryError)" in text
    failed = int(text.split("batch ")[1].split(",")[0])
    assert result.batch == int(math.sqrt(512 * failed))
    assert f"halfway to it, {result.batch}, is given in place of {plan.candidate}" in text


@pytest.mark.parametrize(
    ("step_s", "left", "share"),
    [(1e-5, 40.0, (0.1, 0.5)), (0.002, 40.0, (0.25, 0.25)), (0.002, 12.0, (0.0, 0.0)), (1e-5, 8.0, (0.0, 0.0))],
)
def test_time_is_set_aside_only_where_it_suffices(step_s: float, left: float, share: tuple[float, float]) -> None:
    found = explorer(step_s=step_s)
    reserved = largest.reserve_s(found, plan_of(found, 101 * MB), 101 * MB, left)
    assert share[0] * left <= reserved <= share[1] * left


def test_memory_that_does_not_grow_gives_no_number() -> None:
    found = explorer(per_example=0.0)
    found.look = lambda n: Look(n, "skipped")  # type: ignore[method-assign, assignment]
    result = predict_largest(found, 101 * MB, found.clock.now() + 1.0)
    assert isinstance(result, Largest)
    assert result.batch is None
    assert "does not clearly grow over batches 1..512" in result.notes[-1].text


def test_a_batch_that_ran_out_of_memory_bounds_the_plan() -> None:
    found = explorer()
    found.looks[1024] = Look(1024, "oom", "MemoryError")
    assert plan_of(found, 101 * MB).candidate == 1023


def test_memory_that_cannot_be_read_gives_no_number() -> None:
    found = explorer()
    found.memory.reason = "no such file"
    result = predict_largest(found, 101 * MB, found.clock.now() + 1.0)
    assert isinstance(result, Largest)
    assert (result.batch, result.notes[-1].text) == (None, "no such file")


def request(work: Workload, batch: int, limit: int) -> Request:
    return Request(
        workload=pack(work),
        device="cpu",
        dtype="fp32",
        seed=0,
        batch=batch,
        small=1,
        limit_bytes=limit,
        seconds=5.0,
    )


def test_a_fresh_process_runs_full_steps_of_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "users.py"
    path.write_text(Path(__file__).read_text().replace('name = "wide"', 'name = "users"'))
    outcome = probe.run_probe(request(find(f"{path}:Wide"), 20_000, 1 << 30), 60)
    assert (outcome.status, outcome.steps) == ("ok", 3)
    assert outcome.peak_bytes is not None
    # The batch, 80 MB, and the doubled batch that the backward pass keeps.
    assert outcome.peak_bytes == pytest.approx(160 * MB, rel=0.25)


@pytest.mark.usefixtures("warm_children")
def test_an_overshoot_is_an_error_in_the_child_and_not_a_machine_out_of_memory() -> None:
    outcome = probe.run_probe(request(Wide(), 100_000, 300 * MB), 60)
    assert outcome.status == "oom"
    assert "memory" in (outcome.reason or "").lower()


@pytest.mark.usefixtures("warm_children")
def test_a_prediction_that_runs_out_of_memory_ends_in_a_verified_batch_and_a_living_parent() -> None:
    """The real thing: an example takes about 8 kB, the line says 5 kB, and the address space ends at 300 MB."""
    found = explorer(per_example=5_000)
    plan = plan_of(found, 300 * MB)
    result = verify_largest(found, plan, 300 * MB, found.clock.now() + 120)
    assert result.verified
    assert result.batch is not None
    assert 512 < result.batch < plan.candidate
    assert "ran in a fresh process" in result.notes[-1].text


def test_a_child_that_takes_too_long_is_stopped() -> None:
    outcome = probe.run_probe(request(Wide(), 10, 300 * MB), 0.05)
    assert outcome.status == "timeout"


def test_a_fault_in_the_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_limit", lambda device, limit: None)  # it would stay for this process
    outcome = probe.run(request(Wide(fault=True), 2, 300 * MB))
    assert outcome.status == "error"
    assert "Wide.loss() of workload 'wide' raised KeyError" in (outcome.reason or "")


def test_a_class_that_cannot_be_imported_travels_by_value_or_is_refused_with_the_remedy() -> None:
    class Local(Wide):
        name = "local"

    if importlib.util.find_spec("cloudpickle") is None:
        with pytest.raises(WorkloadError, match="Install cloudpickle"):
            pack(Local())
    else:
        assert pack(Local()).open().name == "local"
