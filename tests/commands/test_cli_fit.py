"""`pybatch fit FILE.csv`: a user's own logs in, every format out."""

import json

import pytest
from typer.testing import CliRunner

from pybatch import Run
from pybatch.base.errors import UsageError
from pybatch.cli import app

ROWS = ["batch,seed,steps,rate,cap"] + [
    f"{b},{seed},{round(100 * (1 + 100 / b) * (1 + 0.01 * seed) * slow)},{rate},9000"
    for b in (8, 16, 32, 64, 128, 256)
    for seed in (0, 1)
    for rate, slow in ((0.1, 1.0), (0.2, 1.5))
]


@pytest.mark.parametrize("format_", ["table", "md", "json", "csv"])
def test_a_file_of_runs_is_fitted_and_told(tmp_path, format_):
    path, page = tmp_path / "runs.csv", tmp_path / "page.html"
    path.write_text("\n".join(ROWS))
    done = CliRunner().invoke(app, ["fit", str(path), "--format", format_, "--html", str(page)])
    assert done.exit_code == 0, done.output
    if format_ == "json":
        text = done.stdout[: done.stdout.rindex("}") + 1]
        [curve] = Run.from_json(text).convergence.curves
        assert (curve.rule, [p.learning_rate for p in curve.points]) == ("tuned", [0.1] * 6)
        assert curve.critical_batch == pytest.approx(100, rel=0.02)
        assert curve.b_min == 8
        assert json.loads(text)["convergence"]["curves"][0]["fit"]["b20_zhang"] == pytest.approx(29.6, rel=0.02)
    elif format_ != "csv":
        assert "critical batch" in done.stdout
        assert "fewest examples" in done.stdout
    assert "<html" in page.read_text()


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([*ROWS[:3], "16,0,many,0.1,9000"]))
    done = CliRunner().invoke(app, ["fit", str(path)])
    assert isinstance(done.exception, UsageError)
    assert "line 4: steps 'many'" in str(done.exception)
