"""`pybatch bench --resume`: a run that was cut goes on, whatever cut it, and only with the run it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.paths import TESTS
from torch import nn

from pybatch import cli
from pybatch.answer.verdict import advise
from pybatch.base.errors import Interrupted, UsageError
from pybatch.capacity import measurement
from pybatch.capacity.largest import Largest
from pybatch.commands import measuring
from pybatch.commands.partial import PartialRecord
from pybatch.device.clock import Clock
from pybatch.device.identity import describe
from pybatch.fits.noise import INTERRUPTED
from pybatch.jobs import bench
from pybatch.jobs import distributed as together
from pybatch.jobs import resume as continuation
from pybatch.jobs.options import BenchOptions
from pybatch.records import (
    BatchPoint,
    Capacity,
    Ceilings,
    CommunicationFit,
    Convergence,
    Distributed,
    DistributedPoint,
    NoiseScale,
    Note,
    Run,
)
from pybatch.report.output import Output
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.running.finding import FILE_MODULE, find
from pybatch.workloads.running.session import Session

CPU = torch.device("cpu")
BATCHES = [8, 16, 32, 64, 128]
OWN = """
import os, time, torch, pybatch
class Own(pybatch.Workload):
    name, reference_batch = "own", 8
    def model(self): return torch.nn.Linear(4, 1)
    def batch(self, n, generator, split="train"):
        if "SUICIDE" in os.environ and os.path.exists(PARTIAL):
            with open(PARTIAL) as file:
                if file.read().count('"steady": true') == 2: os.kill(os.getpid(), 9)
        return torch.randn(n, 4, generator=generator)
    def loss(self, model, batch):
        time.sleep(0.003 + 1e-5 * len(batch))
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
"""

TIMES = """
from cases.planted import PlantedClock
from pybatch.capacity import measurement, largest, probe
from pybatch.jobs import bench
from pybatch.records import Ceilings, NoiseScale
last = [1]
class Kept(Own):
    def batch(self, n, generator, split="train"):
        last[0] = n
        return super().batch(n, generator, split)
def clock_for(device):
    clock = PlantedClock(2e-3, 1e-5)
    clock.batch = lambda: last[0]
    return clock
measurement.clock_for = clock_for
measurement.measure_ceilings = lambda *arguments: Ceilings(1e11, 1e10)
largest.run_probe = lambda *arguments: probe.Outcome("ok", 3, 1)
noise = NoiseScale(40.0, 31.0, 52.0, 0.5, 20.0, "resolved", "planted", 512)
bench.measure_noise = lambda *arguments, **options: noise
"""


class Points(Workload):
    """A regression that keeps the sizes of the batches drawn from it."""

    name, reference_batch = "points", 8
    last = 0  # batch drawn, by any of them

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        self.drawn.append(n)
        Points.last = n
        return torch.randn(n, 4, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss


class PlantedClock(Clock):
    """Runs the work once, and reports 2 ms and 10 us an example on a clock of its own."""

    def __init__(self, device: torch.device) -> None:
        self.time_s, self.rng = 0.0, np.random.default_rng(0)

    def time(self, work: Callable[[], object], count: int) -> list[float]:
        work()
        base = 2e-3 + 1e-5 * Points.last
        times = [float(base * np.exp(self.rng.normal(0, 0.01))) for _ in range(count)]
        self.time_s += sum(times)
        return times

    def now(self) -> float:
        return self.time_s

    def rest(self, seconds: float) -> None:
        self.time_s += seconds


def planted_noise(*arguments: object, **options: object) -> NoiseScale:
    return NoiseScale(40.0, 31.0, 52.0, 0.5, 20.0, "resolved", "planted", 512)


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[None]:
    """Times, ceilings, noise and the largest batch, which this file is not about; the last test has real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "clock_for", PlantedClock)
        patch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(time.time(), 1e9))
        patch.setattr(measurement.largest, "predict_largest", lambda *a: Largest(5000, True))
        patch.setattr(bench, "measure_noise", planted_noise)
        yield


def job(work: Workload, batches: Sequence[int] | None = BATCHES, budget: float = 60.0, **more: Any) -> Run:
    options = BenchOptions(budget, batches=None if batches is None else tuple(batches))
    return bench.run_bench(work, options, device="cpu", **more)


@pytest.fixture(scope="module")
def whole(planted: None) -> tuple[Run, list[Run]]:
    """A run of five batch sizes to its end, and every record that was saved on the way."""
    saved: list[Run] = []
    return job(Points(), on_partial=saved.append), saved


def again(earlier: Run, batches: list[int] = BATCHES) -> tuple[Run, list[int]]:
    work = Points()
    return job(work, batches, earlier=earlier), work.drawn


def capacity(run: Run) -> Capacity:
    assert run.capacity is not None
    return run.capacity


def point(run: Run, batch: int) -> BatchPoint:
    return next(p for p in capacity(run).batches if p.batch == batch)


def measured(point: BatchPoint) -> BatchPoint:
    """A point without what is concluded from all of them together."""
    return dataclasses.replace(point, bound_by=None, bound_why=None)


# What is saved on the way


def test_the_record_grows_batch_by_batch_and_can_be_read_back(whole: tuple[Run, list[Run]]) -> None:
    run, saved = whole
    assert run.complete
    counts = [len(capacity(part).standing) for part in saved]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert {1, 3, 5} <= set(counts)
    assert saved[-1].noise == run.noise
    for part in saved:
        assert not part.complete
        assert Run.from_json(part.to_json()) == part


def test_a_point_carries_what_its_fit_resamples(whole: tuple[Run, list[Run]]) -> None:
    for p in capacity(whole[0]).batches:
        assert p.steady
        assert 10 <= len(p.blocks_ms) <= 39
        assert min(p.blocks_ms) <= (p.step_ms or 0) <= max(p.blocks_ms)


# What stands and what is measured again


def test_batches_measured_stay_to_the_digit_and_only_missing_ones_run(whole: tuple[Run, list[Run]]) -> None:
    part = next(part for part in whole[1] if len(capacity(part).standing) == 3)
    kept = [p.batch for p in capacity(part).standing]
    missing = set(BATCHES) - set(kept)
    run, drawn = again(part)
    assert run.complete
    assert [measured(point(run, n)) for n in kept] == [measured(p) for p in capacity(part).standing]
    assert all(point(run, n).step_ms for n in missing)
    control = sorted(kept)[1]
    assert set(drawn) == {1, control} | missing  # 1: whether a step runs at all
    assert capacity(run).ceilings == capacity(part).ceilings
    assert capacity(run).model is not None
    assert run.noise is not None
    assert run.created == part.created
    texts = [note.text for note in run.notes]
    assert texts[0].startswith("continued on ")
    assert f"batches {', '.join(map(str, kept))}" in texts[0]
    assert any(
        f"batch {control}, which an earlier run had timed, was timed again" in n.text for n in capacity(run).notes
    )


def test_a_complete_run_is_not_measured_again(whole: tuple[Run, list[Run]]) -> None:
    run, drawn = again(whole[0])
    assert drawn == [1]  # one step, to see that the workload still runs
    assert capacity(run).batches == capacity(whole[0]).batches
    before, after = capacity(whole[0]).model, capacity(run).model
    for figure in ("ceiling", "ceiling_high", "half_batch", "saturation_low"):  # blocks are saved to six digits
        assert getattr(after, figure) == pytest.approx(getattr(before, figure), rel=1e-4)
    assert run.noise == whole[0].noise
    assert run.complete


def test_further_batch_sizes_are_added_to_a_complete_run(whole: tuple[Run, list[Run]]) -> None:
    run, _ = again(whole[0], [8, 256])
    assert [p.batch for p in capacity(run).batches] == [8, 16, 32, 64, 128, 256]
    assert point(run, 256).steady
    assert run.noise == whole[0].noise


def test_only_the_noise_is_missing(whole: tuple[Run, list[Run]]) -> None:
    run, _ = again(dataclasses.replace(whole[0], noise=None))
    assert run.noise is not None
    assert capacity(run).batches == capacity(whole[0]).batches


def test_only_the_largest_batch_is_missing(whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found(explorer: object, limit: int, deadline: float) -> Largest:
        asked.append(limit)
        return Largest(77, True)

    monkeypatch.setattr(measurement.largest, "predict_largest", found)
    unverified = dataclasses.replace(capacity(whole[0]), max_batch_verified=False)
    run, _ = again(dataclasses.replace(whole[0], capacity=unverified))
    assert (len(asked), capacity(run).max_batch) == (1, 77)


def test_ctrl_c_in_a_continued_run_keeps_both_parts(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = next(part for part in whole[1] if len(capacity(part).standing) == 2)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement.Rounds, "run", interrupt)
    with pytest.raises(Interrupted) as stop:
        again(part)
    assert not stop.value.partial.complete
    found = capacity(stop.value.partial).standing
    assert [measured(p) for p in found] == [measured(p) for p in capacity(part).standing]


def test_ctrl_c_before_noise_and_branches_keeps_what_a_cut_run_had_of_them(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are measured again; cut before that, the run on disk would be replaced by one without them."""
    part = next(part for part in whole[1] if len(capacity(part).standing) == 2)
    assert whole[0].noise is not None
    noise = dataclasses.replace(whole[0].noise, steps=3)
    steps = Convergence((), (Note("branches", "1 of 2 checkpoints"),), complete=False)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement.Rounds, "run", interrupt)
    with pytest.raises(Interrupted) as stop:
        again(dataclasses.replace(part, noise=noise, convergence=steps))
    left = stop.value.partial
    assert (left.noise, left.convergence, left.complete) == (noise, steps, False)


# The run it goes on with must be the same


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("workload", {"dtype": "bf16"}, "dtype bf16 there, fp32 here"),
        ("workload", {"name": "other"}, "workload other there, points here"),
        ("workload", {"parameters": 9}, "parameters 9 there, 5 here"),
        ("workload", {"options": {"width": 8}}, "option width 8 there, not set here"),
        ("workload", {"optimizer": "sgd"}, "optimizer sgd there, adamw here"),
        ("workload", {"optimizer_options": {"betas": "0.9/0.95"}}, "optimizer's betas 0.9/0.95 there, not set here"),
        ("workload", {"learning_rate": 0.5}, "learning_rate 0.5 there"),
        ("workload", {"reference_batch": 7}, "reference_batch 7 there"),
        ("device", {"name": "Another CPU"}, "device Another CPU there"),
        ("environment", {"seed": 4}, "seed 4 there, 0 here"),
        ("environment", {"torch": "1.0"}, "torch 1.0 there"),
        ("environment", {"threads": 99}, "threads 99 there"),
        ("environment", {"pybatch": "0.0.1"}, "pybatch 0.0.1 there"),
    ],
)
def test_another_run_is_refused_with_every_difference(
    whole: tuple[Run, list[Run]], section: str, change: dict[str, object], says: str
) -> None:
    run = whole[0]
    if section == "environment":
        assert run.environment is not None
        other = dataclasses.replace(run, environment=dataclasses.replace(run.environment, **change))
    else:
        part = dataclasses.replace(getattr(run.capacity, section), **change)
        other = dataclasses.replace(run, capacity=dataclasses.replace(capacity(run), **{section: part}))
    work = Points()
    with pytest.raises(UsageError, match=rf"--resume: .*{says}.*Give the flags"):
        job(work, None, 9.0, earlier=other)
    assert work.drawn == []


def test_compiled_steps_do_not_stand_beside_others(whole: tuple[Run, list[Run]]) -> None:
    other = dataclasses.replace(whole[0], capacity=dataclasses.replace(capacity(whole[0]), mode="compiled"))
    with pytest.raises(UsageError, match="steps compiled there, eager here"):
        job(Points(), None, 9.0, earlier=other)


def test_the_same_run_is_not_refused(whole: tuple[Run, list[Run]]) -> None:
    assert whole[0].environment is not None
    continuation.check_same(whole[0], Session(Points(), CPU).info, describe(CPU), whole[0].environment)


def distributed() -> Distributed:
    points = tuple(DistributedPoint(2, n, 2.0, 3.0) for n in (8, 64))
    return Distributed(2, "gloo", points, CommunicationFit(1.5, 1e9, 1e-5, 100, 0.01, 2))


def test_steps_on_several_devices_are_kept(whole: tuple[Run, list[Run]]) -> None:
    found, _ = again(dataclasses.replace(whole[0], distributed=distributed()))
    assert found.distributed == distributed()
    assert "steps on several devices" in found.notes[0].text
    assert found.verdict == advise(found.capacity, found.noise, None, distributed())
    saved: list[Run] = []
    job(Points(), [*BATCHES, 256], earlier=found, on_partial=saved.append)
    assert saved
    assert all(run.distributed == distributed() for run in saved)


@pytest.mark.parametrize(("devices", "measured_anew"), [(2, False), (4, True)])
def test_only_steps_on_as_many_devices_stand(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch, devices: int, measured_anew: bool
) -> None:
    asked: list[object] = []

    def measure(*arguments: object, **options: object) -> Distributed:
        asked.append(options["batches"])
        return dataclasses.replace(distributed(), devices=devices)

    monkeypatch.setattr(together, "process_group", lambda kind: contextlib.nullcontext(0))
    monkeypatch.setattr(together, "measure_distributed", measure)
    monkeypatch.setattr(together.dist, "broadcast_object_list", lambda told, source: None)
    monkeypatch.setattr(together.dist, "get_world_size", lambda: devices)
    monkeypatch.setattr(together.dist, "get_backend", lambda: "gloo")
    earlier = dataclasses.replace(whole[0], distributed=distributed())
    found = together.run_bench_together(
        Points(), BenchOptions(60.0, batches=tuple(BATCHES)), device=CPU, earlier=earlier
    )
    assert found is not None
    assert found.distributed is not None
    assert found.distributed.devices == devices
    assert bool(asked) == measured_anew


# A user's file


def from_file(path: Path, text: str) -> Workload:
    path.write_text(text)
    for name in [name for name in sys.modules if name.startswith(FILE_MODULE)]:
        del sys.modules[name]  # as a new process does
    return find(f"{path}:Own")


def test_an_edited_workload_file_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    text = f"PARTIAL = ''\n{OWN}"
    first = job(from_file(path, text), [8, 16, 32])
    info = capacity(first).workload
    assert info is not None
    assert info.file_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert Run.from_json(first.to_json()) == first
    path.write_text("changed while it ran")  # what counts is what was loaded
    same = from_file(path, text)
    assert job(same, [8, 16, 32], earlier=first).complete
    edited = from_file(path, text.replace("0.003", "0.004"))
    with pytest.raises(UsageError, match=r"--resume: .* SHA-256 of the workload's file [0-9a-f]{12} there"):
        job(edited, [8, 16, 32], earlier=first)


# The files


def typed(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [("--resume", "none is given. Add -o RUN.json"), ("--resume -o x.csv", "'x.csv' is none")],
)
def test_resume_needs_a_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, f"pybatch bench --cpu {flags}") == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_record_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert typed(monkeypatch, f"pybatch bench --cpu --resume -o {tmp_path}/run.json") == 2
    assert "run.json" in capsys.readouterr().err


def test_what_a_crash_left_comes_before_the_output(
    whole: tuple[Run, list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = PartialRecord(tmp_path / "run.json")
    assert record.earlier() is None
    assert "starts anew" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(whole[0].to_json())
    assert record.earlier() == whole[0]
    record.write(whole[1][2])
    assert record.earlier() == whole[1][2]
    later = record.path.stat().st_mtime_ns + 1_000_000_000
    os.utime(record.output, ns=(later, later))  # written whole, and the process ended before it tidied up
    assert record.earlier() == whole[0]
    record.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_does_not_end_the_run(
    whole: tuple[Run, list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = PartialRecord(tmp_path / "gone" / "run.json")
    record.write(whole[0])
    record.write(whole[0])
    assert capsys.readouterr().err.count("could not be continued") == 1


def test_killed_in_the_middle_and_continued(tmp_path: Path, warm_python: str) -> None:
    """A process, kill -9 once two batch sizes stand on disk, and the command again; its figures are planted."""
    path, partial = tmp_path / "run.json", tmp_path / "run.json.partial"
    (tmp_path / "own.py").write_text(OWN.replace("PARTIAL", repr(str(partial))) + TIMES)
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [warm_python, "-m", "pybatch", "bench", "--cpu", "--workload", f"{tmp_path}/own.py:Kept"]
    command += ["--batch", "8-64*2", "-q", "-o", str(path), "--time-budget"]
    killed = subprocess.run([*command, "90"], capture_output=True, check=False, env=environment | {"SUICIDE": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    left = Run.from_json(partial.read_text())
    kept = capacity(left).standing
    assert 2 <= len(kept) < 4
    done = subprocess.run([*command, "10", "--resume"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 3), done.stderr  # 3: other programs took the time
    run = Run.from_json(path.read_text())
    assert [measured(point(run, p.batch)) for p in kept] == [measured(p) for p in kept]
    assert [p.batch for p in capacity(run).batches] == BATCHES[:4]
    assert json.loads(path.read_text())["notes"][0]["text"].startswith("continued on ")
    if done.returncode == 0:
        assert run.complete
        assert all(p.step_ms for p in capacity(run).batches)
    assert not partial.exists()


# Nothing that was measured is lost


def stop_at(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupt)


@pytest.mark.parametrize("name", ["measure_ceilings", "Session"])
@pytest.mark.parametrize("flags", ["", "--resume"])
def test_ctrl_c_before_the_first_figure_leaves_the_earlier_record(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, flags: str
) -> None:
    part = next(part for part in whole[1] if len(capacity(part).standing) == 3)
    earlier = dataclasses.replace(part, capacity=dataclasses.replace(capacity(part), ceilings=None))
    path, text = tmp_path / "run.json", earlier.to_json()
    path.write_text(text)
    monkeypatch.setattr(bench.continuation, "check_same", lambda *a: None)
    stop_at(monkeypatch, measurement, name)
    (tmp_path / "own.py").write_text(OWN)
    command = f"pybatch bench --cpu --workload {tmp_path}/own.py:Own --batch 8,16 -q -o {path} {flags}"
    assert typed(monkeypatch, command) == 130
    assert path.read_text() == text


def test_what_ran_out_of_memory_in_the_noise_keeps_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB")

    monkeypatch.setattr(bench, "measure_noise", fail)
    run = job(Points())
    assert [p.status for p in capacity(run).batches] == ["ok"] * 5
    assert not run.complete
    assert run.notes[0].figure == "noise"
    assert "memory ran out in steps of batch 8" in run.notes[0].text


def test_an_interrupted_noise_scale_is_measured_to_its_end(whole: tuple[Run, list[Run]]) -> None:
    noise = planted_noise()
    assert continuation.standing_noise(dataclasses.replace(whole[0], noise=noise)) == noise
    cut = dataclasses.replace(noise, notes=(Note("noise.low", f"{INTERRUPTED}; a longer one narrows it"),))
    assert continuation.standing_noise(dataclasses.replace(whole[0], noise=cut)) is None


def test_a_run_over_given_sizes_is_no_search_for_the_range(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pybatch.jobs.bench._closer", lambda work, place, options, found, *_, **given: found.capacity)
    run = job(Points(), None, earlier=whole[0])
    sizes = {p.batch for p in capacity(run).batches}
    assert {1, 2, 4, 256, 1024} <= sizes
    assert [measured(point(run, n)) for n in BATCHES] == [measured(p) for p in capacity(whole[0]).batches]


def test_a_result_that_cannot_be_written_leaves_the_partial_record(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, write = tmp_path / "run.json", Output.write

    def full(self: Output, text: str) -> None:
        if self.path == path:
            raise OSError(28, "No space left on device")
        write(self, text)

    def measured(workload: Workload, options: object, *, on_partial: Callable[[Run], None], **more: object) -> Run:
        on_partial(whole[1][-1])
        return whole[0]

    monkeypatch.setattr(Output, "write", full)
    monkeypatch.setattr(bench, "run_bench", measured)
    assert typed(monkeypatch, f"pybatch bench --cpu -q -o {path}") == 3
    assert "The result follows on stdout" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run.json.partial"]
    assert PartialRecord(path).earlier() == whole[1][-1]


def test_a_partial_record_that_fails_leaves_no_other_file(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pybatch.report.output.os.replace", full)
    PartialRecord(tmp_path / "run.json").write(whole[0])
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_writing_does_not_say_that_nothing_was_measured(
    whole: tuple[Run, list[Run]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda *arguments, **options: whole[0])
    stop_at(monkeypatch, measuring, "deliver")
    assert typed(monkeypatch, f"pybatch bench --cpu -q -o {tmp_path}/run.json") == 130
    assert "interrupted while the result was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "most", "budget", "says"),
    [(4096, 5000, 60.0, None), (8192, 5000, 60.0, "largest that fits is 5000"), (4096, 5000, 0.05, "takes about 0.04")],
)
def test_noise_that_the_device_cannot_run_is_not_begun(
    whole: tuple[Run, list[Run]], batch: int, most: int, budget: float, says: str | None
) -> None:
    """Steps are of 2 ms and 10 us an example: 43 ms at batch 4096."""
    known = dataclasses.replace(capacity(whole[0]), max_batch=most)
    found = bench._beyond(known, batch, budget)
    assert (found is None) if says is None else (found is not None and says in found)
    unfitted = dataclasses.replace(known, model=None)
    assert (bench._beyond(unfitted, batch, budget) is None) == (says is None)
