"""The noise scale along a run: windows, decimation in constant memory, and files that survive a stop."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from pybatch.base.errors import UsageError
from pybatch.fits.accumulator import NoiseAccumulator
from pybatch.noise import trajectory
from pybatch.noise.trajectory import Trajectory, read_trajectory
from pybatch.records import NoisePoint, NoiseTrajectory, to_dict


class Run:
    """A training run whose noise scale grows from 10 to 40: pairs drawn with the right means and some spread."""

    def __init__(self, steps, seed=0):
        self.accumulator, self.steps = NoiseAccumulator("micro-batches"), steps
        self.generator = np.random.default_rng(seed)
        self.seen = []

    @property
    def noise(self):
        return self.accumulator.newest()

    def scale(self, step):
        return 10.0 + 30.0 * step / self.steps

    def step(self, step):
        trace = self.scale(step)
        small, large = 1 + trace / 8, 1 + trace / 32
        self.accumulator.update(small * self.generator.gamma(400) / 400, large * self.generator.gamma(400) / 400, 8, 32)

    def train(self, trajectory, first, last, **options):
        for step in range(first, last + 1):
            self.step(step)
            point = trajectory.update(step, **options)
            if point is not None:
                self.seen.append(point)


def test_points_follow_the_run_and_hold_their_truth():
    """Where the cumulative figure is an average of the past, each point is about its own steps."""
    run = Run(4000)
    path = Trajectory(run, every=10)
    run.train(path, 1, 4000)
    points = path.record.points
    assert 16 <= len(points) <= 32
    assert (points[0].first_step, points[-1].last_step) == (1, 3991)
    assert all(a.last_step < b.first_step for a, b in itertools.pairwise(points))
    held = [p.low <= run.scale((p.first_step + p.last_step) / 2) <= p.high for p in points]
    assert np.mean(held) > 0.85
    assert run.accumulator.estimate().high < points[-1].low  # what one number for the whole run would hide
    assert sum(p.steps for p in points) == 3991
    assert path.record.source == "micro-batches"


def test_memory_is_constant_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(trajectory, "ROWS", 64)
    run = Run(1250)
    path = Trajectory(run, every=1)
    for step in range(1, 1251):
        run.step(step)
        path.update(step, loss=1.0 / step)
        assert len(path._rows) <= 64
    record = path.record
    noise = run.accumulator.estimate()
    assert sum(p.steps for p in record.points) == 1250
    total = sum(p.trace * p.steps for p in record.points)
    assert total == pytest.approx(noise.trace * 1250, rel=1e-9)
    assert record.points[0].loss > 5 * record.points[-1].loss
    assert "32 readings were merged" in record.notes[0].text


def test_reads_only_every_so_many_steps():
    run = Run(100)
    path = Trajectory(run, every=25)
    run.train(path, 1, 100)
    assert [p.last_step for p in run.seen] == [1, 26, 51, 76]
    assert run.seen[-1].status == "unresolved"
    assert "4 readings" in run.seen[-1].reason


def test_there_is_an_early_point_and_few_readings_later():
    run = Run(2000)
    path = Trajectory(run)
    run.train(path, 1, 2000)
    first = next(p for p in run.seen if p.status == "resolved")
    assert first.last_step == 8
    assert first.low <= run.scale(8) <= first.high
    assert len(run.seen) < 300
    assert all(a.last_step + 10 >= b.last_step for a, b in itertools.pairwise(run.seen))
    assert path.record.points[0].last_step < 30


def test_a_run_stopped_while_writing_goes_on(tmp_path):
    """A torn last line is cut off; the file read back is the trajectory that was never stopped."""
    file = tmp_path / "runs" / "noise.jsonl"
    whole, run = Run(1000), Run(1000)
    first = Trajectory(whole, every=10)
    whole.train(first, 1, 1000)
    run.train(Trajectory(run, file, every=10), 1, 501)
    with file.open("a") as f:
        f.write('{"first_step": 502, "last')
    second = Trajectory(run, file, every=10)
    run.train(second, 502, 1000)
    assert second.record == first.record
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"schema": "pybatch-noise/1", "source": "micro-batches", "unit": None}
    assert [line["last_step"] for line in lines[1:]] == list(range(1, 1000, 10))
    assert lines[-1]["status"] == "resolved"
    assert lines[-1]["low"] < lines[-1]["b_simple"] < lines[-1]["high"]


def test_a_file_names_the_source_that_was_turned_to(tmp_path):
    """An ordinary loop begins with micro-batches, which give it nothing; its file said so for ever."""
    run = Run(100)
    path = Trajectory(run, tmp_path / "noise.jsonl")
    run.train(path, 1, 3)
    run.accumulator.source = "per-example"
    run.train(path, 4, 9)
    assert read_trajectory(tmp_path / "noise.jsonl").source == path.record.source == "per-example"


def test_steps_done_again_replace_what_was_recorded(tmp_path):
    """A run resumed from an older checkpoint: later readings of the same steps are the ones that count."""
    file = tmp_path / "noise.jsonl"
    run = Run(1000)
    run.train(Trajectory(run, file), 1, 600)
    again = Trajectory(run, file)
    run.train(again, 301, 1000)
    assert sum(p.steps for p in again.record.points) == pytest.approx(1000, abs=20)
    read_back = Trajectory(run, file)
    assert read_back.record == again.record


def test_a_source_set_back_is_not_negative():
    run = Run(100)
    path = Trajectory(run, every=1)
    run.train(path, 1, 20)
    run.accumulator = NoiseAccumulator("micro-batches")
    run.train(path, 21, 40)
    assert sum(p.steps for p in path.record.points) == 39  # the first reading after it only finds the new start


@pytest.mark.parametrize(
    "content", ["step,noise\n1,2\n", '{"schema": "other/1"}\n', '{"schema": "pybatch-noise/1"}\n{}\n']
)
def test_foreign_files_are_refused_and_kept(tmp_path, content):
    file = tmp_path / "mine.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"mine\.jsonl is not a noise trajectory"):
        Trajectory(Run(10), file)
    assert file.read_text() == content


class Scalars:
    def __init__(self):
        self.kept = []

    def add_scalar(self, tag, value, step):
        self.kept.append((tag, value, step))


def test_tensorboard(monkeypatch, tmp_path):
    run, writer = Run(200), Scalars()
    run.train(Trajectory(run, tensorboard=writer, every=10), 1, 200)
    last = [(tag, step) for tag, _, step in writer.kept][-5:]
    assert last == [(f"noise/{name}", 191) for name in ("b_simple", "low", "high", "grad_sq", "trace")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        Trajectory(run, tensorboard=tmp_path / "logs")
    with pytest.raises(UsageError, match="every 0"):
        Trajectory(run, every=0)


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    run = Run(100)
    run.train(Trajectory(run, tensorboard=tmp_path / "logs"), 1, 100)
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_losses_that_are_not_finite_and_no_pairs(tmp_path):
    class Nothing:
        noise = NoiseAccumulator("ddp").estimate()

    file = tmp_path / "n.jsonl"
    path = Trajectory(Nothing(), file, every=1)
    point = path.update(1, loss=float("nan"))
    assert (point.status, point.loss, point.grad_sq) == ("unresolved", None, None)
    assert "no pair of norms" in point.reason
    assert json.loads(file.read_text().splitlines()[1])["loss"] is None
    assert Trajectory(Nothing(), file).record.points[0].loss is None


def test_the_record_is_plain_json():
    run = Run(400)
    path = Trajectory(run)
    run.train(path, 1, 400)
    body = json.loads(json.dumps(to_dict(path.record)))
    assert set(body["points"][0]) == {f.name for f in dataclasses.fields(NoisePoint)}
    assert set(body) == {f.name for f in dataclasses.fields(NoiseTrajectory)}
