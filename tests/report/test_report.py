"""The formats of --format, from a synthetic record."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from pybatch.base import numerals
from pybatch.base.errors import UsageError
from pybatch.records import BatchPoint, Convergence, ConvergencePoint, Curve, Note, Reason, Run, figure, to_dict
from pybatch.records.figure import figures
from pybatch.report import layout
from pybatch.report.formats.html import page
from pybatch.report.formats.text import FORMATS, format_of, notes_in, print_run, render
from pybatch.report.output import Output
from pybatch.report.verdict import first_figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (0.000012345, "1.23e-05"),
        (0.012345, "0.0123"),
        (1.2345, "1.23"),
        (99.96, "100"),
        (32.0, "32"),
        (123.4, "123"),
        (12345, "12,300"),
        (-45.67, "-45.7"),
        (2.47e24, "2.47e+24"),
        (-1e15, "-1.00e+15"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert numerals.number(value) == text


def test_other_numerals():
    assert numerals.count(4810.4) == "4,810"
    assert numerals.share(0.1234) == "12.3 %"
    assert numerals.share(1.02) == "102 %"
    assert numerals.share(1e-5) == "< 0.1 %"
    assert numerals.share(0.0) == "0 %"
    assert numerals.memory(1536) == "1.50 KiB"
    assert numerals.memory(0) == "0 B"
    assert numerals.rate(8.71e10, "FLOP/s") == "87.1 GFLOP/s"
    assert numerals.interval(1.0, None) == "[≥ 1]"
    assert numerals.interval(None, 2.0) == "[≤ 2]"
    assert numerals.interval(1.0, 2.0) == "[1 to 2]"
    assert numerals.interval(None, None) == ""


def test_the_table_fits_80_columns_and_is_plain(run):
    text = render(run, "table")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for expected in (
        "batch",
        "step ms",
        "8.40",
        "saturation",
        "predicted oom",
        "B_simple",
        "[31 to 52]",
        "Use batch 32.",
    ):
        assert expected in text


def wide(run):
    """The widest cells that a real run has, in every column."""
    points = [
        dataclasses.replace(p, step_ms=12_345.6, step_ms_low=1e4, step_ms_high=1.5e4, samples_per_s=98_765_432.0)
        for p in run.capacity.batches
        if p.status == "ok"
    ]
    points[-1] = dataclasses.replace(points[-1], batch=33_554_432, memory_bytes=1000 * 2**30, bound_by="compute")
    return dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, batches=tuple(points)))


def many_rules():
    """Six rules at batch sizes where some runs fail: wider than any terminal."""
    points = tuple(ConvergencePoint(8 * 4**k, 123_456.0, "reached", 3, 0.01, reached=2) for k in range(6))
    names = ("constant", "sqrt", "linear", "tuned", "square_root_capped", "another")
    return Convergence(tuple(Curve(name, "train", points, None, None, None, None, 0.1) for name in names))


def test_no_table_is_wider_than_80_columns_and_none_loses_a_figure(run):
    text = render(wide(run), "table")
    assert max(map(len, text.splitlines())) <= 80
    cells = {word for line in text.splitlines() if line.split()[:1] == ["33,554,432"] for word in line.split()}
    assert {"12,300", "98,765,432", "1,000", "compute"} <= cells
    swept = Run("", None, convergence=many_rules())
    lines = render(swept, "table").splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split()[:1] == ["8,192"]]
    assert sum(cell == "123,456" for row in rows for cell in row) == 6
    heads = {word for line in lines if line.split()[:1] == ["batch"] for word in line.split()}
    assert heads == {"batch", "constant", "sqrt", "linear", "tuned", "square_root_capped", "another"}


def test_a_figure_is_said_once_and_stands_in_every_format(run, monkeypatch):
    """A column more, by its declaration alone."""
    own = dict(figures(BatchPoint))
    monkeypatch.setitem(own, "sm_clock_mhz", dataclasses.replace(own["sm_clock_mhz"], shown=True))
    monkeypatch.setattr(figure, "figures", lambda kind: own if kind is BatchPoint else figures(kind))
    monkeypatch.setattr(layout, "figures", figure.figures)
    points = tuple(dataclasses.replace(p, sm_clock_mhz=1410.0) for p in run.capacity.batches)
    note = Note("batches.sm_clock_mhz", "seen at the end")
    capacity = dataclasses.replace(run.capacity, batches=points, notes=(note,))
    figure.hidden.cache_clear()
    try:
        shown = dataclasses.replace(run, capacity=capacity)
        for text in (render(shown, "table", True), render(shown, "md", True), page([shown]), shown._repr_html_()):
            assert "SM clock MHz" in text
            assert text.count("1,410") >= 5  # the page has it behind a plot too
            assert "seen at the end" in text
    finally:
        figure.hidden.cache_clear()


def test_every_figure_of_the_table_is_in_the_record(run):
    row = next(line for line in render(run, "table").splitlines() if line.split()[:1] == ["512"])
    assert row.split() == ["512", "53.2", "0.8", "9,624", "96.2", "%", "12.3", "%", "3", "MiB", "–"]


def test_json_is_the_record(run):
    assert Run.from_json(render(run, "json")) == run


def test_csv_has_one_row_a_batch(run):
    rows = list(csv.DictReader(io.StringIO(render(run, "csv"))))
    assert [int(row["batch"]) for row in rows] == [p.batch for p in run.capacity.batches]
    assert {row["workload"] for row in rows} == {"digits"}
    assert float(rows[1]["step_ms"]) == run.capacity.batches[1].step_ms
    assert rows[-1]["step_ms"] == ""


def test_jsonl_names_each_record(run):
    lines = [json.loads(line) for line in render(run, "jsonl").splitlines()]
    assert [line["record"] for line in lines] == ["run"] + ["batch"] * 5 + ["capacity", "noise", "verdict"]
    assert lines[0]["complete"] is True
    assert {"schema", "environment", "device", "ceilings", "workload", "notes"} <= set(lines[0])
    assert lines[-2].items() >= to_dict(run.noise).items()


def test_markdown_escapes_hostile_names(run):
    device = dataclasses.replace(run.capacity.device, name="evil|<script>*`_[x](y)\nname")
    hostile = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, device=device))
    head = render(hostile, "md").splitlines()[0]
    assert "\\<script\\>" in head
    assert not re.search(r"(?<!\\)[|<>*`\[\]]", head)


def test_markup_in_names_is_printed_as_it_is(run):
    workload = dataclasses.replace(run.capacity.workload, name="[bold]x[/bold]")
    hostile = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, workload=workload))
    assert "[bold]x[/bold]" in render(hostile, "table")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_prints_a_run_without_sections(run, format_):
    bare = Run(run.created, run.environment, complete=False, notes=(Note("run", "interrupted"),))
    assert "interrupted" in render(bare, format_) or format_ == "csv"


@pytest.mark.parametrize("status", ["lower_bound", "unresolved"])
def test_an_unresolved_noise_scale_prints_no_number_for_it(run, status):
    noise = dataclasses.replace(
        run.noise, status=status, b_simple=None, high=None, low=31.0 if status == "lower_bound" else None
    )
    text = render(dataclasses.replace(run, noise=noise), "table")
    assert ("at least 31 images" in text) == (status == "lower_bound")
    assert ("B_simple  unresolved" in text) == (status == "unresolved")


def test_the_reason_of_a_null_is_in_the_record_and_not_on_a_page_without_the_figure(run):
    assert "streaming multiprocessors" not in render(run, "table")
    assert "streaming multiprocessors" in render(run, "json")
    said = "steps to target were not measured"
    assert said in " ".join(render(run, "table", verbose=True).split())
    brief = " ".join(render(run, "table").split())
    assert said not in brief
    assert re.search(r"\d+ more notes?: --verbose", brief)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, "--verbose, or keep them: -o run.json, --html page.html"),
        (Path("a b/page.html"), "'a b/page.html', under Details"),
        (Path("runs.db"), "'pybatch report runs.db' makes a page with all of them"),
    ],
)
def test_notes_that_are_left_out_are_said_with_where_they_stand(run, kept, said):
    text = io.StringIO()
    print_run(run, Console(file=text, width=200), more=notes_in(kept))
    assert re.search(rf"^\d+ more notes?: {re.escape(said)}$", text.getvalue(), re.M)


def test_a_narrow_or_wide_console_loses_no_column(run):
    for width in (60, 200):
        text = io.StringIO()
        print_run(run, Console(file=text, width=width))
        assert "memory" in text.getvalue()


def test_the_ending_of_a_file_names_its_format(tmp_path):
    assert format_of(tmp_path / "a.JSON") == "json"
    with pytest.raises(
        UsageError, match=r"ends in no format known here \(.json, .jsonl, .csv, .md, .txt\). Add --format"
    ):
        format_of(tmp_path / "a.xls")


def test_output_replaces_the_file_at_once_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    output = Output(path)
    assert path.read_text() == "old"
    output.write("new")
    output.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "new"


def test_a_discarded_output_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    Output(path).discard()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "old"


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        Output(tmp_path / "missing" / "run.json")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        Output(tmp_path / "file" / "run.json")
    with pytest.raises(UsageError, match="is a folder"):
        Output(tmp_path)


def test_what_a_verdict_rests_on_may_be_no_number(run):
    """Inputs of a reason are a table of names: where a number is looked for and none is there, none is said."""
    reasons = tuple(
        Reason(figure, "why", "modelled", {name: "modelled"})
        for figure, name in (("doubling", "time_factor"), ("useful_devices", "measured_devices"))
    )
    shown = render(dataclasses.replace(run, verdict=dataclasses.replace(run.verdict, reasons=reasons)), "md")
    assert "modelled, without communication" in shown
    assert "times the time" not in shown


def test_the_best_batch_stands_with_its_bounds_also_where_it_has_no_value(run):
    verdict = run.verdict
    [tile] = [tile for tile in first_figures(verdict) if tile[0] == "best batch"]
    assert tile[1:] == (
        numerals.count(verdict.best_batch),
        f"[{numerals.count(verdict.best_low)} to {numerals.count(verdict.best_high)}]",
    )
    bare = dataclasses.replace(verdict, best_batch=None, best_low=512, best_high=None)
    assert ("best batch", "–", "[≥ 512]") in first_figures(bare)
