"""`pybatch report`, `pybatch compare`, and what `pybatch bench` does with them afterwards."""

import dataclasses
import json
import subprocess
import sys

import pytest
import typer.testing

from pybatch import cli
from pybatch.base.errors import UsageError
from pybatch.commands.saved import read_records
from pybatch.jobs import bench as main_job
from pybatch.noise.trajectory import SCHEMA, read_trajectory
from pybatch.records import Convergence, Curve

runner = typer.testing.CliRunner()


@pytest.fixture
def saved(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    return path


@pytest.fixture
def slower(run, tmp_path):
    def slow(point):
        return dataclasses.replace(
            point, **{k: 1.2 * getattr(point, k) for k in ("step_ms", "step_ms_low", "step_ms_high")}
        )

    points = tuple(slow(p) if p.status == "ok" else p for p in run.capacity.batches)
    path = tmp_path / "slower.json"
    path.write_text(dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, batches=points)).to_json())
    return path


def test_report_writes_one_page_from_runs_and_a_trajectory(saved, tmp_path):
    line = {"first_step": 0, "last_step": 9, "pairs": 10, "grad_sq": 10.0, "trace": 400.0, "loss": 5.0, "losses": 10}
    head = {"schema": SCHEMA, "source": "ddp", "unit": "tokens"}
    lines = [json.dumps(head), *(json.dumps(line | {"first_step": 10 * i, "last_step": 10 * i + 9}) for i in range(20))]
    (tmp_path / "noise.jsonl").write_text("\n".join(lines) + '\n{"torn')
    before = (tmp_path / "noise.jsonl").read_bytes()
    page = tmp_path / "a.html"
    done = runner.invoke(cli.app, ["report", str(saved), str(saved), str(tmp_path / "noise.jsonl"), "-o", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count("<section") == 3
    assert "Noise scale along training" in text
    assert (tmp_path / "noise.jsonl").read_bytes() == before  # a run may be writing it
    assert read_trajectory(tmp_path / "noise.jsonl").unit == "tokens"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not a pybatch record"),
        ("[]", "schema None"),
        ('{"schema": "pybatch/0"}', "schema 'pybatch/0', this pybatch reads"),
        ("\x00\xff", "not"),
    ],
)
def test_a_file_that_is_no_record_is_named(text, cause, tmp_path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=cause) as raised:
        read_records(path)
    assert "x.json" in str(raised.value)


def test_a_trajectory_that_is_none_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"schema": "other/1"}\n')
    with pytest.raises(UsageError, match=r"x\.jsonl is not a noise trajectory"):
        read_records(tmp_path / "x.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_records(tmp_path / "absent.jsonl")


def test_compare_prints_and_fails_where_it_shall(saved, slower):
    done = runner.invoke(cli.app, ["compare", str(saved), str(slower)])
    assert done.exit_code == 0
    assert "worse" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    done = runner.invoke(cli.app, ["compare", str(saved), str(slower), "--fail-on", "throughput:-3%"])
    assert done.exit_code == 1
    assert "throughput changed by -16.7 %, past the limit of -3 %" in done.output
    done = runner.invoke(cli.app, ["compare", str(saved), str(slower), "--format", "json"])
    assert json.loads(done.output)["changes"][0]["figure"] == "throughput"
    assert runner.invoke(cli.app, ["compare", str(saved), str(slower), "--format", "md"]).output.startswith("# pybatch")


@pytest.mark.parametrize("format_", ["table", "json"])
def test_a_gate_fails_whoever_reads_what_it_says(saved, slower, format_):
    """Piped with stderr into `grep -q` or `head`, it ended with 0."""
    command = f"{sys.executable} -m pybatch compare {saved} {slower} --fail-on throughput:-3% --format {format_}"
    script = f"{command} 2>&1 | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_bench_compares_and_reports_after_measuring(monkeypatch, run, saved, slower, tmp_path):
    monkeypatch.setattr(main_job, "run_bench", lambda *a, **k: run)
    page = tmp_path / "r.html"
    arguments = [
        "bench",
        "--cpu",
        "--quiet",
        "--compare",
        str(slower),
        "--fail-on",
        "throughput:+3%",
        "--html",
        str(page),
    ]
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 1, done.output
    assert "better" in done.output
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--quick", "--thorough"], "exclude each other"),
        (["--fail-on", "throughput:-3%"], "Add --compare"),
        (["--compare", "absent.json"], "'absent.json' cannot be read"),
        (["--html", "absent/x.html"], "'absent/x.html' cannot be written"),
    ],
)
def test_bad_flags_are_refused_before_measuring(monkeypatch, arguments, cause, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_job, "run_bench", lambda *a, **k: pytest.fail("measured"))
    done = runner.invoke(cli.app, ["bench", "--cpu", *arguments])
    assert isinstance(done.exception, UsageError)
    assert cause in str(done.exception)


def test_a_dry_run_measures_nothing(monkeypatch):
    monkeypatch.setattr(main_job, "run_bench", lambda *a, **k: pytest.fail("measured"))
    done = runner.invoke(cli.app, ["bench", "--cpu", "--dry-run", "--thorough", "--batch", "1,2"])
    assert done.exit_code == 0, done.output
    assert "batches   1, 2" in done.output
    assert "branched runs" in done.output
    assert "180 s at most" in done.output


def test_a_trajectory_alone_is_a_table_too(tmp_path):
    line = {"first_step": 0, "last_step": 9, "pairs": 10, "grad_sq": 10.0, "trace": 400.0, "loss": 5.0, "losses": 10}
    lines = [{"schema": SCHEMA, "source": "ddp", "unit": "tokens"}]
    lines += [line | {"first_step": 10 * i, "last_step": 10 * i + 9} for i in range(20)]
    (tmp_path / "noise.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = runner.invoke(cli.app, ["report", str(tmp_path / "noise.jsonl"), "-o", str(tmp_path / "a.md")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("# Noise scale along a training\n")
    assert "## Noise scale along training" in text
    assert "ddp, in tokens" in text
    assert "| 0 to " in text


def test_a_report_says_the_answers_it_holds(run, tmp_path):
    """A target that no run reached was told on the page alone."""
    curve = Curve("tuned", "train", (), None, None, None, None, target=1e-4)
    steps = Convergence((curve,), optimizer="sgd", device=run.capacity.device, workload=run.capacity.workload)
    sweep = dataclasses.replace(run, capacity=None, noise=None, verdict=None, convergence=steps)
    for name, one in (("a.json", run), ("b.json", sweep)):
        (tmp_path / name).write_text(one.to_json())
    page = tmp_path / "r.html"
    done = runner.invoke(cli.app, ["report", str(tmp_path / "b.json"), str(tmp_path / "b.json"), "-o", str(page)])
    assert ", swept with sgd</a>" in page.read_text()
    assert ", swept with sgd: The critical batch cannot be told from these runs." in " ".join(done.output.split())
    done = runner.invoke(cli.app, ["report", str(tmp_path / "a.json"), "-o", str(page)])
    assert run.verdict.answer in " ".join(done.output.split())


def test_png_flag_writes_figures_alone(saved, tmp_path, monkeypatch):
    from pybatch.report.formats import png

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(png, "write_pngs", lambda runs, folder: [folder / f"{len(runs)}.png"])
    done = runner.invoke(cli.app, ["report", str(saved), "--png", "figures"])
    assert done.exit_code == 0, done.output
    assert "wrote 1 figure to figures" in done.output
    assert not (tmp_path / "report.html").exists()


def test_a_run_saved_as_jsonl_says_what_to_save(run, tmp_path):
    from pybatch.report.formats.text import render

    (tmp_path / "run.jsonl").write_text(render(run, "jsonl"))
    done = runner.invoke(cli.app, ["report", str(tmp_path / "run.jsonl")])
    assert isinstance(done.exception, UsageError)
    assert "save it as .json" in str(done.exception)
