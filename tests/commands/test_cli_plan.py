"""`pybatch plan`: the plan in words on stderr, the options alone on stdout."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from pybatch.base.errors import UsageError
from pybatch.cli import app
from pybatch.report.snippets import TRAINERS


def planned(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_numbers_of_every_trainer_multiply_to_the_batch(trainer):
    done = planned("--global-batch", "4096", "--devices", "8", "--largest", "100", "--for", trainer)
    assert done.exit_code == 0, done.output
    text = done.stdout
    numbers = {int(number) for number in re.findall(r"(?<![\w.])\d+\b", text)}
    assert 64 in numbers, text
    assert numbers <= {64, 8, 4096}, text
    assert "4,096 = 64 examples × 8 passes × 8 devices" in done.stderr
    # Where the options do not say the number of devices, stderr does.
    assert 8 in numbers or "must be 8" in done.stderr


def test_deepspeeds_is_its_file():
    done = planned("--global-batch", "96", "--devices", "2", "--largest", "16", "--for", "deepspeed")
    config = json.loads(done.stdout)
    assert config == {"train_batch_size": 96, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("torchtitan", "--training.local_batch_size 16 --training.global_batch_size 96\n"),
        ("megatron", "--micro-batch-size 16 --global-batch-size 96\n"),
    ],
)
def test_others_take_their_batch_and_the_whole_one(trainer, options):
    done = planned("--global-batch", "96", "--devices", "2", "--largest", "16", "--for", trainer)
    assert done.stdout == options


def test_a_record_is_enough(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    done = planned(str(path), "--for", "hf")
    assert "per_device_train_batch_size=32" in done.stdout
    assert "32 on 1 device is the batch that the record advises" in done.stderr
    done = planned(str(path), "--devices", "3", "--format", "json")
    found = json.loads(done.stdout)
    assert found["micro_batch"] * found["accumulation"] * 3 == found["global_batch"] == 33
    assert "33 is the nearest" in done.stderr
    done = planned(str(path), "--global-batch", "163840")
    assert done.stdout.startswith("163,840 = 81,920 images × 2 passes × 1 device; about")


@pytest.mark.parametrize("batch", [[], ["--global-batch", "4096"]])
def test_more_devices_than_the_record_finds_worth_it_are_told(run, tmp_path, batch):
    verdict = dataclasses.replace(run.verdict, useful_devices=2, useful_devices_low=1, useful_devices_high=4)
    path = tmp_path / "run.json"
    path.write_text(dataclasses.replace(run, verdict=verdict).to_json())
    done = planned(str(path), "--devices", "8", *batch)
    assert "8 devices: the record finds 2 devices [1 to 4] worth it, not 8" in done.stderr
    for few in ("2", "1"):
        assert "worth it" not in planned(str(path), "--devices", few, *batch).stderr


def test_a_record_that_does_not_know_the_devices_worth_it_says_nothing_of_them(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(dataclasses.replace(run, verdict=None).to_json())
    assert "worth it" not in planned(str(path), "--devices", "8", "--global-batch", "4096").stderr


def test_without_a_limit_it_is_said_that_none_is_known():
    done = planned("--global-batch", "4096", "--for", "hf")
    assert "per_device_train_batch_size=4096" in done.stdout
    assert "whether 4,096 fit a device is not known" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--global-batch", "100", "--devices", "3"], "Use 99 or 102"),
        (["--for", "hf"], "Give --global-batch N"),
        (["--global-batch", "0"], "from 1"),
        (["--global-batch", "8", "--for", "hg"], "Did you mean 'hf'"),
        (["--global-batch", "8", "--format", "xml"], "table, json"),
        (["missing.json"], "missing.json"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(arguments, said):
    done = planned(*arguments)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


def test_a_batch_that_was_timed_fits(run, tmp_path):
    """Of a watched run the largest that fits may not be known, and yet 512 ran."""
    path, capacity = tmp_path / "run.json", dataclasses.replace(run.capacity, max_batch=None)
    path.write_text(dataclasses.replace(run, capacity=capacity).to_json())
    largest = max(p.batch for p in capacity.batches if p.status == "ok")
    done = planned(str(path), "--global-batch", str(largest))
    assert done.exit_code == 0
    assert "not known" not in done.stderr
    assert "is not known: give a record" in planned(str(path), "--global-batch", str(2 * largest)).stderr
    assert f"{largest} was timed" in planned(str(path)).stderr
