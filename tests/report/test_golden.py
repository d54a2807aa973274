"""Reports as they were read and approved: `pytest --update-golden tests/report/test_golden.py` writes them anew."""

import dataclasses
import difflib
import json
from pathlib import Path

import pytest
from cases.points import point
from cases.verdicts import BRANCHES, MODELS, SWEEP, capacity, noise, swept_by

from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError
from pybatch.records import (
    BatchPoint,
    Capacity,
    CommunicationFit,
    Convergence,
    Curve,
    Device,
    Distributed,
    DistributedPoint,
    Note,
    Run,
)
from pybatch.report.formats.text import render, render_all

GOLDEN = Path(__file__).parent / "golden"


def judged(measured, scale, steps=None, distributed=None, **more):
    device = Device("cpu", 0, "Example CPU", 2**34, cores=2)
    measured = dataclasses.replace(measured, device=device) if measured is not None else None
    verdict = advise(measured, scale, steps, distributed)
    return Run("2026-01-02T03:04:05+00:00", None, measured, scale, steps, verdict, distributed=distributed, **more)


def out_of_memory():
    fine = capacity(max_batch=96, batches=(1, 4, 16, 64))
    lost = (BatchPoint(128, "oom", reason="out of memory"), BatchPoint(256, "predicted_oom", reason="needs 40 GiB"))
    return dataclasses.replace(fine, batches=(*fine.batches, *lost))


def several():
    points = tuple(DistributedPoint(k, 64, 20.8, 20.8 + 3 * (k - 1), 20.0, 32.0) for k in (2, 4))
    return Distributed(4, "gloo", points, CommunicationFit(1.4, 2e9, 5e-5, 19_240, 0.03, 4))


def rules():
    """Two rules, of which one fails, on both splits."""
    failed = (point(8, 900.0), point(64, None, 0), point(512, None, 0, status="diverged", rate=None))
    linear = Curve("linear", "train", failed, None, None, 64.0, None, target=0.1, notes=(Note("points", "of linear"),))
    good = swept_by(MODELS["power"]).curves[0]
    test = dataclasses.replace(good, split="test", target=0.5)
    return Convergence((linear, good, test), (Note("curves", "of all"),), optimizer="sgd", seeds=3, trials=108)


NOTHING = Capacity(None, None, None, None, None, None, None, None, None, None)
RUNS = {
    "noise-limits": lambda: judged(capacity(), noise(40)),
    "hardware-limits": lambda: judged(capacity(max_batch=50), noise(12_000)),
    "balanced": lambda: judged(capacity(), noise(380)),
    "lower-bound": lambda: judged(capacity(), noise(None, 90, status="lower_bound")),
    "unresolved": lambda: judged(capacity(), noise(None, status="unresolved")),
    "no-noise": lambda: judged(capacity(), None),
    "no-fit": lambda: judged(NOTHING, noise(40), complete=False, notes=(Note("run", "interrupted by Ctrl-C"),)),
    "out-of-memory": lambda: judged(out_of_memory(), noise(40)),
    "sweep": lambda: judged(capacity(), noise(40), rules()),
    "sweep-lower-bound": lambda: judged(capacity(), noise(40), Convergence((SWEEP["lower bound"][0],))),
    "sweep-upper-bound": lambda: judged(capacity(), noise(40), Convergence((SWEEP["upper bound"][0],))),
    "branches": lambda: judged(capacity(), noise(40), Convergence((), branches=(BRANCHES["fitted"][0],), seeds=2)),
    "several-devices": lambda: judged(capacity(), noise(12_000), distributed=several()),
}


@pytest.mark.parametrize("name", RUNS)
def test_markdown_is_as_approved(name, request):
    path, text = GOLDEN / f"{name}.md", render(RUNS[name](), "md")
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    lines = difflib.unified_diff(
        path.read_text(encoding="utf-8").splitlines(), text.splitlines(), str(path), "now", n=1
    )
    difference = "\n".join(lines)
    assert not difference, f"{difference}\nIf it is meant: pytest --update-golden"


def test_there_is_no_golden_file_without_its_run():
    assert {path.stem for path in GOLDEN.glob("*.md")} == set(RUNS)


def test_a_changed_figure_would_be_seen():
    changed = judged(capacity(), noise(41))
    assert render(changed, "md") != (GOLDEN / "noise-limits.md").read_text(encoding="utf-8")


def test_a_record_of_another_version_is_refused_with_the_remedy():
    data = json.loads(RUNS["noise-limits"]().to_json())
    with pytest.raises(UsageError, match=r"schema 'pybatch/2', this pybatch reads 'pybatch/1'\. .*measure again"):
        Run.from_json(json.dumps(data | {"schema": "pybatch/2"}))
    with pytest.raises(UsageError, match=r"unknown keys \['later'\].* measure again"):
        Run.from_json(json.dumps(data | {"noise": data["noise"] | {"later": 1}}))


@pytest.mark.parametrize("schema", ["pybatch/x", "other/1", "pybatch/1.5", 1, None])
def test_what_names_no_version_is_refused(schema):
    with pytest.raises(UsageError, match="Give a file written by 'pybatch bench -o'"):
        Run.from_json(json.dumps({"schema": schema}))


def test_several_runs_in_one_file():
    runs = [RUNS["sweep"](), RUNS["no-noise"]()]
    assert render_all(runs, "md").count("\n# ") == 1
    rows = render_all(runs, "csv").splitlines()
    assert len(rows) == 1 + sum(len(run.capacity.batches) for run in runs)
    with pytest.raises(UsageError, match=r"these are 2\. Use \.jsonl"):
        render_all(runs, "json")
