"""Writers: what was written is read back; what is not installed is refused by name."""

import builtins
import csv

import pytest
import torch
from torch import nn

from pybatch import noise
from pybatch.base.errors import UsageError
from pybatch.integrations.writers import CSVWriter, TensorBoardWriter, WandbWriter, write_run


class Tracker:
    """As a run of W&B."""

    def __init__(self):
        self.rows = []

    def log(self, values, step):
        self.rows += [(step, tag, value) for tag, value in values.items()]

    def finish(self):
        self.rows.append("finished")


def read(path):
    with path.open(newline="") as file:
        return [(int(row["step"]), row["tag"], float(row["value"])) for row in csv.DictReader(file)]


def test_a_record_goes_to_every_writer_alike(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker()
    writers = CSVWriter(tmp_path / "runs" / "a.csv"), TensorBoardWriter(tmp_path / "board"), WandbWriter(tracker)
    for writer in writers:
        write_run(run, writer)
        writer.close()
    rows = read(tmp_path / "runs" / "a.csv")
    assert (512, "capacity/step_ms", pytest.approx(53.2)) in rows
    assert (0, "verdict/best_batch", 32.0) in rows
    assert (100, "noise/b_simple", 40.0) in rows
    assert tracker.rows.pop() == "finished"
    assert tracker.rows == [(step, tag, pytest.approx(value)) for step, tag, value in rows]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    found = [(e.step, tag, e.value) for tag in board.Tags()["scalars"] for e in board.Scalars(tag)]
    assert sorted(found) == [(s, t, pytest.approx(v, rel=1e-6)) for s, t, v in sorted(rows)]


def test_a_csv_file_is_gone_on_with_and_another_refused(tmp_path):
    path = tmp_path / "a.csv"
    for step in (1, 2):
        writer = CSVWriter(path)
        writer.add_scalar("noise/b_simple", 0.1 + step, step)
        assert read(path)[-1] == (step, "noise/b_simple", 0.1 + step)  # at once
        writer.close()
    assert len(read(path)) == 2
    other = tmp_path / "other.csv"
    other.write_text("batch,steps\n8,100\n")
    with pytest.raises(UsageError, match="another CSV file: it begins with 'batch,steps'"):
        CSVWriter(other)
    with pytest.raises(UsageError, match="cannot be written"):
        CSVWriter(tmp_path)


def test_a_trajectory_is_written_as_it_grows(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = noise.attach(model, optimizer)
    trajectory = noise.Trajectory(handle, tensorboard=CSVWriter(tmp_path / "noise.csv"), every=1)
    for step in range(1, 31):
        for _ in range(2):
            model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.update(step)
    rows = read(tmp_path / "noise.csv")
    assert {step for step, _, _ in rows} == set(range(rows[0][0], 31))
    point = trajectory.update(31)
    assert (31, "noise/trace", pytest.approx(point.trace, rel=1e-8)) in read(tmp_path / "noise.csv")


@pytest.mark.parametrize(
    ("package", "make", "said"),
    [
        ("wandb", lambda: WandbWriter(project="mine"), r"Weights & Biases can't be imported .*'pip install wandb'"),
        ("torch.utils.tensorboard", lambda: TensorBoardWriter("x"), r"TensorBoard can't .*'pip install tensorboard'"),
    ],
)
def test_what_is_not_installed_is_refused_by_name(package, make, said, monkeypatch):
    plain = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=said):
        make()
