"""Branches along a run: the criteria on planted losses, the quadratic's truth, checkpoints, and the record."""

from __future__ import annotations

import json
import math
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.verdicts import capacity, noise

from pybatch.answer.verdict import advise
from pybatch.base.errors import Interrupted, UsageError, WorkloadError
from pybatch.branch import checkpoint
from pybatch.branch import run as branched_run
from pybatch.branch.measurement import measure_branches
from pybatch.branch.summary import WINDOW, summarize
from pybatch.records import Convergence, Note, Run
from pybatch.workloads.digits import Digits
from pybatch.workloads.quadratic import Quadratic
from pybatch.workloads.running.loss_scale import LossScale
from pybatch.workloads.running.session import Session

BASE, BATCHES = 16, [4, 8, 16, 32, 64, 128, 256, 512]
EXAMPLES = WINDOW * 512.0


def planted(critical: float, repeats: int = 3, noise: float = 0.0, seed: int = 0) -> dict[int, list[np.ndarray]]:
    """Losses exp(-steps / 40 / (1 + critical / B)): by construction, steps to any level follow the hyperbola."""
    rng = np.random.default_rng(seed)
    looks = np.linspace(0, EXAMPLES, WINDOW + 1)
    found: dict[int, list[np.ndarray]] = {}
    for batch in BATCHES:
        curve = np.exp(-(looks / batch) / 40 / (1 + critical / batch))
        wobble = noise * rng.standard_normal((repeats, WINDOW + 1))
        wobble[:, 0] = 0.0
        found[batch] = list(curve * np.exp(wobble))
    return found


def summed_up(losses: dict[int, list[np.ndarray]], tolerance: float = 0.02) -> Any:
    return summarize(100, BASE, int(EXAMPLES), dict.fromkeys(losses, 0.1), losses, tolerance)


@pytest.mark.parametrize("critical", [20.0, 60.0, 150.0])
def test_a_planted_critical_batch_is_found_and_its_interval_holds_it(critical: float) -> None:
    exact = summed_up(planted(critical)).fit
    assert exact.critical_batch == pytest.approx(critical, rel=0.15)  # looks are few, and smoothed
    noisy = summed_up(planted(critical, noise=0.03)).fit
    assert noisy.low <= critical <= noisy.high
    assert noisy.high < 12 * noisy.low


def test_the_largest_batch_within_the_tolerance() -> None:
    losses = planted(60.0)
    gaps = {b: np.mean(losses[b][0][-4:]) / np.mean(losses[BASE][0][-4:]) - 1 for b in BATCHES}
    between = (gaps[64] + gaps[128]) / 2
    assert summed_up(losses, between).largest == 64
    assert summed_up(losses, gaps[16] + 0.9 * (gaps[32] - gaps[16])).largest == BASE
    top = summed_up(losses, 0.99 * gaps[512] + 10)
    assert (top.largest, top.largest_high) == (512, None)
    assert any("every batch tested" in note.text for note in top.notes)
    close = summed_up(planted(60.0, noise=0.2), gaps[64])  # as likely within as not
    assert close.largest_low < close.largest_high
    assert {32, 64} <= {close.largest_low, close.largest_high}


def test_a_larger_batch_behind_a_failing_one_does_not_count() -> None:
    losses = planted(60.0)
    for batch, factor in ((64, 2.0), (128, 0.01)):
        for row in losses[batch]:
            row[1:] *= factor
    assert summed_up(losses, 0.8).largest == 32


def test_branches_that_diverge_are_labels() -> None:
    losses = planted(60.0)
    for row in losses[512]:
        row[5:] = math.nan
    found = summed_up(losses)
    assert found.points[-1].losses == (None, None, None)
    assert found.fit.critical_batch == pytest.approx(60, rel=0.15)
    assert any("diverged" in note.text for note in found.fit.notes)
    for rows in losses.values():
        for row in rows:
            row[1:] = math.nan
    nothing = summed_up(losses)
    assert (nothing.fit, nothing.level, nothing.largest) == (None, None, None)
    assert "the base branch diverged" in nothing.notes[0].text


def test_a_loss_that_does_not_fall_gives_no_critical_batch() -> None:
    losses = {batch: [np.full(WINDOW + 1, 0.3) + 0.001 * np.arange(WINDOW + 1)] for batch in BATCHES}
    found = summed_up(losses)
    assert found.fit is None
    assert "does not fall within the window" in found.notes[0].text


def test_only_repeats_that_every_batch_has_are_compared() -> None:
    losses = planted(60.0)
    losses[512] = losses[512][:1]
    assert len(summed_up(losses).points[0].losses) == 1


def test_batches_that_had_run_once_stand_where_the_time_budget_ended_the_others() -> None:
    losses = planted(60.0, repeats=1)
    for batch in (128, 256, 512):
        losses[batch] = []
    found = summed_up(losses)
    assert [p.batch for p in found.points] == [4, 8, 16, 32, 64]
    assert found.fit.critical_batch == pytest.approx(60, rel=0.15)
    assert any("before batch 128, 256, 512 had run once" in note.text for note in found.notes)
    base_last = summed_up(losses | {32: [], 64: []})
    assert any("no batch above the base one was run" in note.text for note in base_last.notes)
    for none in (losses | {BASE: []}, {b: rows if b == BASE else [] for b, rows in losses.items()}):
        empty = summed_up(none)
        assert (empty.points, empty.fit) == ((), None)
        assert "before the base branch and another had run" in empty.notes[0].text


def test_a_verdict_says_that_the_noise_scale_stands_in_for_branches_without_an_answer() -> None:
    nothing = summed_up({batch: [] for batch in BATCHES})
    cut = Convergence((), (Note("branches", "the time budget ended before step 50. Raise it"),))
    for steps, why in (
        (Convergence((), branches=(nothing,)), "before the base branch and another had run"),
        (cut, "before step 50"),
    ):
        [note] = [n for n in advise(capacity(), noise(40), steps).notes if "branches give" in n.text]
        assert note.figure == "verdict.critical_source"
        assert why in note.text
        assert "the noise scale stands in for it" in note.text
        [note] = [n for n in advise(capacity(), None, steps).notes if "branches give" in n.text]
        assert (note.figure, note.text.endswith("no noise scale was measured")) == ("verdict.critical_batch", True)
        assert why in note.text
    fitted = Convergence((), branches=(summed_up(planted(60.0)),))
    assert not any("give no critical batch" in n.text for n in advise(capacity(), noise(40), fitted).notes)


def steps_of_means(work: Quadratic, theta: np.ndarray, level: float, batch: int, rate: float) -> float:
    """Steps until the exact E L, from E theta_i^2 = theta, is at a level."""
    steps = 0
    while (work.h * theta).sum() / 2 > level:
        theta = (1 - rate * work.h) ** 2 * theta + rate**2 * work.c / batch
        steps += 1
    return steps


def test_branches_of_the_quadratic_take_the_steps_of_the_closed_form() -> None:
    """Real training from a real checkpoint, against the exact recursion of E theta^2 from the same point."""
    work, rate = Quadratic(d=30, noise=0.2), 0.2
    factors = [1, 2, 4, 8]
    found = measure_branches(
        work, device="cpu", checkpoints=[20], factors=factors, base_batch=4, optimizer="sgd", rule="constant",
        lr=rate, seeds=6, window=1024,
    ).branches[0]  # fmt: skip
    start = 1.0 * (1 - rate * work.h) ** 40  # E theta_i^2 at the checkpoint, but for its noise
    assert found.loss == pytest.approx((work.h * start).sum() / 2, rel=0.25)
    scale = found.loss / ((work.h * start).sum() / 2)
    for point in found.points[:3]:
        expected = steps_of_means(work, scale * start, found.level, point.batch, rate)
        assert np.median([s for s in point.steps if s]) == pytest.approx(expected, rel=0.2, abs=2)
    assert [p.batch for p in found.points] == [4, 8, 16, 32]
    assert {p.learning_rate for p in found.points} == {rate}


def toward(target: float | None, checkpoints: list[int], work: Any = None, **options: Any) -> Convergence:
    """Branches of a run that by SGD at rate 0.1 is at loss 0.3 by step 81."""
    given = {"base_batch": 8, "optimizer": "sgd", "rule": "constant", "lr": 0.1, "seeds": 1, **options}
    work = work or Quadratic(d=30, noise=0.02)
    return measure_branches(work, device="cpu", checkpoints=checkpoints, target=target, **given)


@pytest.mark.parametrize(
    ("target", "asked", "branched", "said"),
    [
        (0.3, [60], [20], "at the target by step 81: it is branched from at step 20 in place of 60"),
        (0.3, [60, 100], [20], "at the target by step 81: it is branched from at step 20 in place of 60, 100"),
        (0.3, [20, 100], [20], "at the target by step 81: step 100 is past half the way, and left out"),
        (0.3, [20], [20], None),
        (0.02, [20], [20], None),  # beyond twice the steps
        (5.0, [20], [20], None),  # untrained it is there
    ],
)
def test_branches_leave_the_first_half_of_the_way_to_the_target(
    target: float, asked: list[int], branched: list[int], said: str | None
) -> None:
    record = toward(target, asked, factors=[1, 2], window=256)
    assert [found.step for found in record.branches] == branched
    plain = toward(None, branched, factors=[1, 2], window=256)
    assert [found.loss for found in record.branches] == [found.loss for found in plain.branches]  # the same run
    assert record.target == (target if target < 1 else None)
    assert any("is met before the first step" in note.text for note in record.notes) == (target > 1)
    told = [note.text for note in record.notes if note.figure == "branches.step"]
    assert told == ([] if said is None else [f"the base run is {said}"])
    assert record.complete


class Dropped(Quadratic):
    """Its steps draw from torch's own generator."""

    name = "dropped"

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * (0.5 + torch.rand(()) if model.training else 1.0)


def test_the_look_ahead_changes_nothing_of_the_run(tmp_path: Path) -> None:
    """Neither what it draws, nor what is kept in a folder, where the same call finds the same."""
    given: dict[str, Any] = {"work": Dropped(d=30, noise=0.02), "factors": [1, 2], "window": 256}
    ahead, plain = toward(0.3, [30, 60], **given), toward(None, [30], **given)
    assert [(b.step, b.loss) for b in ahead.branches] == [(30, plain.branches[0].loss)]
    early = toward(0.3, [60], **given)
    assert early.branches[0].step < 30
    assert toward(0.3, [60], folder=tmp_path, **given) == toward(0.3, [60], folder=tmp_path, **given) == early


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_a_tuned_branch_does_not_run_past_the_target(rate: float) -> None:
    """It is there in a fifth of the steps that the rate in use takes: the window is as much shorter."""
    [found] = toward(0.3, [60], lr=rate, tune=True).branches
    assert found.level == 0.3
    base = next(p for p in found.points if p.batch == 8)
    assert 1 < base.steps[0] / (found.window / 8) * WINDOW < WINDOW / 2  # looks


def test_a_look_ahead_that_breaks_down_or_takes_long_leaves_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = branched_run.Trained.evaluate

    def broken(self: Any, batch: Any) -> float:
        return evaluate(self, batch) if self.done <= 30 else math.nan

    monkeypatch.setattr(branched_run.Trained, "evaluate", broken)
    assert [b.step for b in toward(0.3, [30], factors=[1, 2], window=256).branches] == [30]
    monkeypatch.undo()
    ticks = iter(range(10**6))
    monkeypatch.setattr("pybatch.branch.run.time.monotonic", lambda: 0.1 * next(ticks))
    cut = toward(0.3, [60], factors=[1, 2], window=256, time_budget=2.0)  # 0.4 s of it ahead: not to step 81
    assert [b.step for b in cut.branches] == [60]
    assert not any(note.figure == "branches.step" for note in cut.notes)


@pytest.mark.parametrize(("target", "level"), [(0.8, 0.8), (0.2, None), (0.99, None), (2.0, None)])
def test_steps_are_counted_to_a_target_that_the_base_branch_reaches_soon(target: float, level: float | None) -> None:
    """Not where it lies past half the window, or before the first look."""
    losses = planted(60.0)
    found = summarize(100, BASE, int(EXAMPLES), dict.fromkeys(losses, 0.1), losses, 0.02, target)
    plain = summed_up(losses)
    assert found.level == (level or plain.level)
    assert [note.figure for note in found.notes if note not in plain.notes] == ([] if level else ["level"])
    assert found.fit.critical_batch == pytest.approx(60.0, rel=0.2)


def short(**options: Any) -> Any:
    given = {"device": "cpu", "checkpoints": [10], "factors": [0.5, 1, 2, 4], "seeds": 2, "tune": False, **options}
    return measure_branches(Digits(), **given)


def test_every_branch_starts_at_the_checkpoint_and_takes_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, int] = {}
    starts: list[float] = []
    original = Session.batch

    def counted(self: Session, n: int, split: Any = "train") -> Any:
        drawn[n] = drawn.get(n, 0) + n
        return original(self, n, split)

    advance = branched_run.Trained.advance

    def watched(self: Any, batch: int, rate: Any, steps: int) -> torch.Tensor:
        if self.done == 0 and batch != 32:
            starts.append(float(self.session.parameters[0].detach().sum()))
        return advance(self, batch, rate, steps)

    monkeypatch.setattr(Session, "batch", counted)
    monkeypatch.setattr(branched_run.Trained, "advance", watched)
    found = short()
    window = found.branches[0].window
    assert window == WINDOW * 128
    del drawn[512]  # the fixed batch
    assert drawn == {16: 2 * window, 32: 2 * window + 10 * 32, 64: 2 * window, 128: 2 * window}
    assert len(set(starts)) == 1
    assert found.trials == 8
    rates = [p.learning_rate for p in found.branches[0].points]
    assert rates == pytest.approx([3e-3 * math.sqrt(k) for k in (0.5, 1, 2, 4)])  # AdamW: by the square root


def test_sgd_scales_linearly_and_a_rule_can_be_named() -> None:
    rates = [p.learning_rate for p in short(optimizer="sgd", lr=0.1).branches[0].points]
    assert rates == pytest.approx([0.05, 0.1, 0.2, 0.4])
    rates = [p.learning_rate for p in short(rule="constant").branches[0].points]
    assert rates == [3e-3] * 4


def test_the_run_goes_on_as_if_it_had_not_branched_and_the_seed_decides_everything() -> None:
    both, again, late = (short(checkpoints=c, seeds=1) for c in ([10, 30], [10, 30], [30]))
    assert both == again
    assert both.branches[1].loss == late.branches[0].loss
    assert both.branches[1].points == late.branches[0].points


def test_checkpoints_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = short(folder=tmp_path / "kept")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["step-10.pt"]
    trained: list[int] = []
    advance = branched_run.Trained.advance

    def watched(self: Any, batch: int, rate: Any, steps: int) -> torch.Tensor:
        trained.append(self.session.workload is not None and batch == 32 and steps == 10)
        return advance(self, batch, rate, steps)

    monkeypatch.setattr(branched_run.Trained, "advance", watched)
    assert short(folder=tmp_path / "kept") == first
    assert not any(trained)
    with pytest.raises(UsageError, match="belongs to another run"):
        short(folder=tmp_path / "kept", seed=1)
    with pytest.raises(UsageError, match="belongs to another run"):
        measure_branches(Digits("cnn"), device="cpu", checkpoints=[10], folder=tmp_path / "kept")


def test_a_checkpoint_holds_tensors_and_plain_values_alone(tmp_path: Path) -> None:
    short(folder=tmp_path)
    state = torch.load(tmp_path / "step-10.pt", weights_only=True)
    assert {"model", "optimizer", "generator", "loss_scale", "step", "identity", "format"} == set(state)


class Loud(Digits):
    """Gradients that overflow fp16 at the first scale."""

    def loss(self, model: Any, batch: Any) -> Any:
        return 1000 * super().loss(model, batch)


@pytest.mark.parametrize("again", [False, True])  # from the folder
def test_branches_in_fp16_go_on_at_the_loss_scale_of_the_run(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would leave its first updates out, the more the fewer steps it has."""
    begun: list[tuple[int, LossScale]] = []
    advance = branched_run.Trained.advance

    def watched(self: Any, batch: int, rate: Any, steps: int) -> Any:
        begun.append((self.done, replace(self.session.scaling)))
        return advance(self, batch, rate, steps)

    options: dict[str, Any] = {"device": "cpu", "dtype": "fp16", "checkpoints": [12], "factors": [1, 2]}
    options |= {"seeds": 1, "folder": tmp_path, "base_batch": 8, "lr": 1e-4}
    if again:
        measure_branches(Loud(), **options)
    monkeypatch.setattr(branched_run.Trained, "advance", watched)
    measure_branches(Loud(), **options)
    branches = begun[not again :]  # before them stands the base run, where it is not in the folder
    kept = torch.load(tmp_path / "step-12.pt", weights_only=True)["loss_scale"]["value"]
    assert kept < 2.0**16
    assert [scale.value for done, scale in branches if not done] == [kept] * 2


class Harm:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "harm done")


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, harmed = tmp_path / "step-10.pt", tmp_path / "harmed"
    if form == "torch":
        torch.save(Harm(harmed), path)
    elif form == "nested":
        torch.save({"format": checkpoint.FORMAT, "model": {"weight": Harm(harmed)}}, path)
    else:
        path.write_bytes(pickle.dumps(Harm(harmed)))
    with pytest.raises(UsageError, match="is refused: it holds more than tensors") as caught:
        short(folder=tmp_path)
    assert str(path) in str(caught.value)
    assert not harmed.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert harmed.exists()  # the harm is real: loaded otherwise, it is done


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged|is refused"),
        (b"PK\x03\x04 no archive", "is damaged"),
        (b"hello\n", r"is damaged or no checkpoint \(101\)"),  # torch takes it for a pickle, and looks up an 'e'
        ({"model": 1}, "was not written by this"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "step-10.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=says) as caught:
        short(folder=tmp_path)
    assert str(path) in str(caught.value)
    assert "Delete it, and it is made anew" in str(caught.value)
    assert "torch.load" not in str(caught.value)  # no advice that is for programmers of torch


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be made"):
        short(folder=tmp_path / "file" / "in")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factors": [1]}, "no factor but 1"),
        ({"factors": [0.3, 1]}, r"factor 0\.3 of base batch 32 makes 9\.6 examples.* take another base batch"),
        ({"factors": [-1, 1]}, "factor -1 makes no batch"),
        ({"base_batch": 0}, "base batch 0 is below 1"),
        ({"checkpoints": []}, "give steps of the base run"),
        ({"checkpoints": [-5]}, "give steps of the base run"),
        ({"seeds": 0}, "seeds 0"),
        ({"tolerance": 1.5}, "tolerance 1.5 is no share"),
        ({"target": math.nan}, "target nan is no loss"),
        ({"window": 0}, "window 0"),
        ({"time_budget": 0.0}, "leaves no time"),
        ({"optimizer": "adamv"}, "Did you mean 'adam'"),
        ({"rule": "cubic"}, "rule 'cubic' is not known"),
        ({"rule": "adascale", "factors": [1, 2]}, "rule 'adascale' needs more"),
        ({"rule": "tuned"}, "rule 'tuned' needs more"),
        ({"lr": -1.0}, "-1"),
        ({"lr": 0.0}, "finite rate above 0"),
        ({"lr": float("inf")}, "finite rate above 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        short(**options)


def test_a_base_run_that_diverges_is_the_workloads_error() -> None:
    with pytest.raises(WorkloadError, match="step 10 of the base run, at rate 1e\\+20"):
        measure_branches(Quadratic(), device="cpu", checkpoints=[10], optimizer="sgd", lr=1e20)


def test_a_base_run_whose_loss_rises_is_no_complete_result() -> None:
    """A rate of 4 multiplies the error by up to 3 a step: far from the start after 10, and finite still."""
    hot = {"optimizer": "sgd", "lr": 4.0, "factors": [1, 2], "seeds": 2}
    found = measure_branches(Quadratic(d=5), device="cpu", checkpoints=[10], **hot)  # type: ignore[arg-type]
    assert not found.complete
    text = next(note.text for note in found.notes if note.figure == "branches")
    assert re.fullmatch(r"the base run's loss rose from .* by step 10, at rate 4: .* Lower the learning rate.*", text)
    assert not any("rose" in note.text for note in short().notes)


def test_the_time_budget_ends_repeats_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: others that compute must not take all of the time before the first repeat."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("pybatch.branch.run.time.monotonic", lambda: 0.01 * next(ticks))
    found = short(seeds=1000, time_budget=5.0)
    assert not found.complete
    assert 0 < len(found.branches[0].points[0].losses) < 1000
    assert "within the time budget. Raise it" in found.notes[0].text


def test_a_budget_too_short_for_the_base_run_says_so() -> None:
    found = short(checkpoints=[10**9], time_budget=0.5)
    assert (found.branches, found.complete) == ((), False)
    assert "ended before step 1000000000" in found.notes[0].text


def test_default_factors_are_cut_to_what_the_budget_affords(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gives each look at it 0.1 s: with 25 steps between two of them, 4 ms a step."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("pybatch.branch.run.time.monotonic", lambda: 0.1 * next(ticks))
    given: dict[str, Any] = {"device": "cpu", "checkpoints": [50], "seeds": 1, "time_budget": 10.0}
    found = measure_branches(Quadratic(d=5), tune=False, **given)
    batches = [p.batch for p in found.branches[0].points]
    assert batches == [4, 8, 16, 32, 64]
    assert found.branches[0].window == WINDOW * 64
    assert any("batches above 64 were left out" in note.text for note in found.notes)
    assert found.complete  # one repeat was asked for, and run


def test_a_search_that_is_over_costs_no_batch_sizes() -> None:
    """Once the rate is found, what the search took is behind the deadline, and counts in the time that is left."""
    batches = [4, 8, 16, 32, 64, 128]
    scaled = branched_run.rated({"lr": 0.1}, "constant", 0.1, 8, batches)
    unit = WINDOW * max(batches)
    seconds = 2 * sum(unit / batch * max(1.0, batch / 8) for batch in batches)  # of two repeats, a step a second
    for searches, kept in ((True, batches[:-1]), (False, batches)):
        plan = branched_run.BranchPlan(
            8, unit, "sgd", {"lr": 0.1}, "constant", scaled, 1, 0.02, time.monotonic() + seconds + 60, True, True
        )
        run = branched_run.BranchedRun(Quadratic(d=5), torch.device("cpu"), "fp32", 0, plan, None, None)
        run.step_seconds = 1.0
        run._shrink(searches=searches)
        assert run.batches == kept


def test_an_interrupted_run_keeps_its_finished_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    original = branched_run.BranchedRun.branch

    def once(self: Any, step: int, begin: float, share: float) -> None:
        if self.found:
            raise KeyboardInterrupt
        original(self, step, begin, share)

    monkeypatch.setattr(branched_run.BranchedRun, "branch", once)
    with pytest.raises(Interrupted) as caught:
        short(checkpoints=[10, 20])
    assert [b.step for b in caught.value.partial.branches] == [10]
    assert not caught.value.partial.complete


def test_branches_are_saved_in_the_record_and_reach_the_verdict(run: Run) -> None:
    steps = short(checkpoints=[10, 30], factors=[0.25, 0.5, 1, 2, 4, 8])
    saved = Run(run.created, run.environment, convergence=steps)
    assert Run.from_json(saved.to_json()) == saved
    assert json.loads(saved.to_json())["workload"]["name"] == "digits"
    verdict = advise(run.capacity, run.noise, steps)
    fit = steps.branches[-1].fit
    assert verdict.critical_source == "branch"
    both = sorted((fit.critical_batch, run.noise.b_simple))  # weighed with the noise scale
    assert both[0] <= verdict.critical_batch <= both[1]
    alone = advise(run.capacity, None, steps)
    assert alone.critical_batch == fit.critical_batch
    assert [(r.kind, r.factor) for r in alone.evidence] == [("branch", 8.0)]
    assert "branched runs" in verdict.text or verdict.critical_batch is None
    assert verdict.why("critical_batch").evidence == "measured"
    assert advise(run.capacity, run.noise, None).critical_source == "noise"


@pytest.mark.parametrize("off", [1 / 4, 1.0, 8.0])
def test_a_rate_that_nobody_tuned_is_searched_at_the_checkpoint(off: float) -> None:
    """From far below and far above a rate near the best of half a window is found."""
    work = Quadratic(d=10, noise=0.05)
    given: dict[str, Any] = {
        "device": "cpu",
        "checkpoints": [5],
        "factors": [1, 2],
        "base_batch": 8,
        "optimizer": "sgd",
    }
    usual = 0.2 * off
    found = measure_branches(work, lr=usual, tune=True, rule="constant", seeds=1, window=512, **given)
    [at] = found.branches
    rate = at.points[0].learning_rate
    assert at.tuned
    assert 0.2 <= rate <= 1.7  # the loss of 32 steps is least at about 0.8
    assert rate / usual == 2.0 ** round(math.log2(rate / usual))
    assert f"branches at {rate:g}, tuned at the checkpoint" in found.notes[-1].text
    fixed = measure_branches(work, lr=usual, rule="constant", seeds=1, window=512, **given)
    assert not fixed.branches[0].tuned
    assert fixed.branches[0].points[0].learning_rate == usual
