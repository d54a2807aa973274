"""`pybatch schedule`: from a record or a law to a table, JSON and other trainers' options."""

import dataclasses
import json

import pytest
from cases import hostile

from pybatch import records as r
from pybatch.report.run import plots


def point(first, last, value):
    return r.NoisePoint(first, last, value, value / 2, value * 2, 1.0, 1.0, "resolved", 10)


@pytest.fixture
def record(tmp_path):
    points = tuple(point(100 * i + 1, 100 * i + 100, 20.0 * 1.3**i) for i in range(20))
    noise = r.NoiseScale(100, 80, 120, 1.0, 1.0, "resolved", "micro-batches", 10, trajectory=points)
    run = r.Run("", None, noise=noise, training=r.Training("train.py", "Net", "AdamW", batch=32))
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    return path


def test_a_table_with_the_answer_first(record):
    status, out, _ = hostile.typed("schedule", str(record), "--steps", "2000")
    assert status == 0
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines[0] == "pybatch schedule"
    assert lines[1].startswith("Use batch ")
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_a_record_that_report_reads(record, tmp_path):
    out = tmp_path / "schedule.json"
    assert hostile.typed("schedule", str(record), "--steps", "2000", "-o", str(out))[0] == 0
    found = r.Run.from_json(out.read_text()).batch_schedule
    assert found is not None
    assert found.base_batch == 32
    assert len(found.stages) >= 3
    page = tmp_path / "page.html"
    assert hostile.typed("report", str(out), "-o", str(page))[0] == 0
    assert found.answer in page.read_text()


def test_the_page_of_the_run_draws_the_schedule_over_its_noise(record, tmp_path):
    page = tmp_path / "page.html"
    typed = ("schedule", str(record), "--steps", "2000", "--html", str(page), "--format", "json")
    found = r.Run.from_json(hostile.typed(*typed)[1]).batch_schedule
    run = dataclasses.replace(r.Run.from_json(record.read_text()), batch_schedule=found)
    [drawn] = [plot for plot in plots(run) if plot.name.startswith("schedule")]
    band, _, batches = drawn.traces
    assert list(batches["y"]) == [stage.batch for stage in found.stages for _ in range(2)]
    assert band["x"][:2] == [50.5 * 32, 150.5 * 32]
    assert band["y"][:2] == [10.0, 13.0]
    text = page.read_text()
    assert found.because in text
    assert "Noise scale along training" in text


@pytest.mark.parametrize("trainer", ["megatron", "olmo", "hf", "lightning", "torchtitan"])
def test_the_options_of_other_trainers_have_every_stage(record, trainer):
    words = ("schedule", str(record), "--steps", "2000", "--sequence-length", "128", "--max-batch", "4096")
    found = r.Run.from_json(hostile.typed(*words, "--format", "json")[1]).batch_schedule
    status, out, _ = hostile.typed(*words, "--for", trainer)
    assert status == 0
    for stage in found.stages:
        last = stage.first_step + stage.steps - 1
        token = {
            "megatron": f"{stage.first_example * 128}:{stage.batch}",
            "olmo": f"Duration.tokens({stage.first_example * 128})",
            "torchtitan": f"--training.global_batch_size {stage.batch} --training.steps {last}",
        }.get(trainer, f"({stage.first_example}, {stage.batch})")
        assert token in out
    if trainer in ("hf", "lightning", "olmo"):
        compile(out, trainer, "exec")


def test_options_are_printed_and_files_written_all_the_same(record, tmp_path):
    out, page = tmp_path / "schedule.json", tmp_path / "page.html"
    words = ("schedule", str(record), "--steps", "2000", "--for", "hf", "-o", str(out), "--html", str(page))
    status, printed, _ = hostile.typed(*words)
    assert status == 0
    assert printed.startswith("# TrainingArguments")
    assert r.Run.from_json(out.read_text()).batch_schedule is not None
    assert page.exists()


def test_a_law_stands_in_for_a_record():
    status, out, _ = hostile.typed(
        "schedule", "--law", "1e-6,1.5", "--batch", "64", "--examples", "1e6", "--format", "json"
    )
    assert status == 0
    assert json.loads(out)["batch_schedule"]["source"] == "law"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "100"), "give a record, RUN.json, or --law"),
        (("RECORD",), "give --steps N or --examples N"),
        (("RECORD", "--steps", "1e999"), "steps"),
        (("RECORD", "--steps", "100", "--for", "hf", "--format", "json"), "Give one of them"),
        (("RECORD", "--steps", "100", "--for", "jax"), "--for 'jax' is not known"),
        (("RECORD", "--steps", "100", "--for", "megatron"), "counts in tokens"),
        (("RECORD", "--steps", "100", "--rate", "cubic"), "rate rule 'cubic'"),
        (("RECORD", "--steps", "100", "--devices", "0"), "devices 0"),
        (("RECORD", "--steps", "100", "--max-batch", "-1"), "--max-batch -1"),
        (("--law", "1", "--batch", "8", "--steps", "100"), "no pair of numbers"),
        (("--law", "1,1", "--steps", "100"), "--law needs the batch"),
        (("--law", "nan,1", "--batch", "8", "--steps", "100"), "law nan,1"),
        (("missing.json", "--steps", "100"), "cannot be read"),
    ],
)
def test_bad_words(record, words, says):
    typed = [str(record) if word == "RECORD" else word for word in words]
    status, out, err = hostile.typed("schedule", *typed)
    assert (status, out) == (2, "")
    assert says in err


def test_a_run_without_a_trajectory_says_what_to_measure(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(hostile.record().to_json())
    status, _, err = hostile.typed("schedule", str(path), "--steps", "100")
    assert status == 2
    assert "pybatch watch" in err
