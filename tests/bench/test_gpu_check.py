"""The GPU check's own logic, without a GPU: a stage that fails, hangs or breaks costs itself; time is kept."""

import contextlib
import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import counters
import gpu_check
import per_example
import pytest
import sweep_at_scale
import torch
from cases import warm
from cases.paths import TESTS
from gpu_check import Check, Outcome

from pybatch.base.ranges import parse_batches

BENCH = Path(gpu_check.__file__).parent


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """A check of three stages: one prints, one hangs with a child of its own, one raises in the script itself."""
    found = Check(None, tmp_path / "stages", tmp_path / "site", 60.0)
    found.output.mkdir()

    def run(name, code, limit):
        status, log, seconds = found.run(name, [sys.executable, "-c", code], limit)
        return Outcome(name, status, seconds, log)

    def broken():
        raise KeyError("no such figure")

    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages = {
        "build": lambda: run("build", "print('built')", 20),
        "hangs": lambda: run("hangs", hang, 1.0),
        "broken": broken,
        "fails": lambda: run("fails", "raise SystemExit('wrong')", 20),
        "last": lambda: run("last", "print('here')", 20),
    }
    monkeypatch.setattr(found, "stages", lambda: stages)
    return found


def test_every_stage_runs_whatever_the_others_do(checks, tmp_path, capsys):
    outcomes = gpu_check.check(checks.ordered(None), checks, {"device": "none"}, tmp_path)
    assert {o.stage: o.status for o in outcomes} == {
        "build": "ok",
        "hangs": "timeout",
        "broken": "failed",
        "fails": "failed",
        "last": "ok",
    }
    assert outcomes[1].seconds < 10
    assert "no such figure" in outcomes[2].detail
    assert capsys.readouterr().out.count("\n") == 5
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [stage["status"] for stage in written["stages"]] == [o.status for o in outcomes]
    with tarfile.open(tmp_path / "gpu_check.tar.gz") as archive:
        assert "gpu_check/last.log" in archive.getnames()


def test_a_stage_stopped_at_its_limit_says_what_it_found(checks, tmp_path):
    """Killed at once, pytest would not name a single failure."""
    source = tmp_path / "test_slow.py"
    source.write_text("import time\ndef test_wrong():\n    assert 1 == 2\ndef test_hangs():\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", str(source)]
    status, log, seconds = checks.run("slow", command, 5)
    assert status == "timeout"
    assert "assert 1 == 2" in log
    assert "1 failed" in log
    assert seconds < 5 + gpu_check.GRACE_S


def test_the_most_telling_tests_come_first(tmp_path, monkeypatch):
    made = []
    check = Check(0, tmp_path, tmp_path, 60.0)
    monkeypatch.setattr(check, "run", lambda stage, command, limit: made.append(command) or ("ok", "", 1.0))
    check.tests()
    files = [Path(part).relative_to(TESTS).as_posix() for part in made[0] if part.endswith(".py")]
    assert files[: len(gpu_check.TESTS_FIRST)] == list(gpu_check.TESTS_FIRST)
    assert len(files) == len(set(files)) > len(gpu_check.TESTS_FIRST)
    marked = {p.relative_to(TESTS).as_posix() for p in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()}
    assert set(files) >= marked


def test_the_sanitizers_look_at_our_kernels_alone(tmp_path, monkeypatch):
    """torch asks the driver for functions it may lack: each would be an error of the stage."""
    made = []
    check = Check(0, tmp_path, tmp_path, 60.0)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    monkeypatch.setattr(check, "run", lambda stage, command, limit, **kw: made.append(command) or ("ok", "", 1.0))
    check.sanitizer("memcheck")
    assert made[0][3:7] == ["--kernel-name", "kernel_substring=pybatch", "--report-api-errors", "no"]


def test_the_trap_list_is_made_on_its_device(monkeypatch):
    """A copy to the device would be aligned and dense, and the traps gone."""
    import gpu_traps

    made = []

    def tensors(dtype, device, backend):
        made.append((device, backend))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_traps.problem, "tensors", tensors)
    with pytest.raises(KeyboardInterrupt):
        gpu_traps.train(gpu_traps.optim.SGD, "cuda", torch.float32)
    assert made == [("cuda", "cuda")]


def test_figures_with_gaps_are_told_from_a_failure(checks):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert checks.run("gaps", command, 20, incomplete=3)[0] == "incomplete"
    assert checks.run("gaps", command, 20)[0] == "failed"


def test_nothing_runs_after_a_failed_build(checks, tmp_path, monkeypatch):
    stages = {"build": lambda: Outcome("build", "failed", 1.0), "tests": lambda: pytest.fail("ran")}
    monkeypatch.setattr(checks, "stages", lambda: stages)
    assert [o.stage for o in gpu_check.check(["build", "tests"], checks, {}, tmp_path)] == ["build"]


def test_a_kept_build_is_of_the_sources_as_they_are(tmp_path, monkeypatch):
    """Between two calls on a warm machine the kernels may be edited: the old ones must not be tested in their place."""
    runs = []
    check = Check(None, tmp_path, tmp_path / "site", 60.0)
    check.site.mkdir()
    monkeypatch.setattr(check, "run", lambda stage, command, limit, **kw: runs.append(command) or ("ok", "", 1.0))
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "kernels/step.cu"):
        (root / name).write_text("first")
    monkeypatch.setattr(gpu_check, "ROOT", root)
    check.build()
    assert check.build().detail.startswith("kept")
    (root / "kernels/step.cu").write_text("edited")
    assert not check.build().detail.startswith("kept")
    assert len(runs) == 2
    assert "--upgrade" in runs[0]
    monkeypatch.setattr(check, "run", lambda *args, **kw: ("failed", "", 1.0))
    (root / "kernels/step.cu").write_text("broken")
    check.build()
    assert check.build().status == "failed"  # nothing of a failed build is kept


def test_the_time_is_kept(checks, tmp_path):
    checks.end -= 50  # 10 s are left: too few for a new stage
    outcomes = gpu_check.check(["build", "last"], checks, {}, tmp_path)
    assert [o.status for o in outcomes] == ["ok", "skipped"]
    assert "no time was left" in outcomes[1].detail
    checks.end -= 9
    status, _, seconds = checks.run("slow", [sys.executable, "-c", "import time; time.sleep(30)"], 30)
    assert (status, seconds < 5) == ("timeout", True)


def test_stages_asked_for_come_in_their_order_after_the_build(checks):
    assert checks.ordered("last,fails") == ["build", "last", "fails"]
    with pytest.raises(ValueError, match=r"no stage lost\. There are: build, hangs"):
        checks.ordered("lost")


def test_every_stage_named_first_exists_and_every_script_too(tmp_path):
    names = Check(None, tmp_path, tmp_path, 1.0).ordered(None)
    assert len(names) == len(set(names))
    assert set(gpu_check.ORDER) <= set(names)
    for name in ("step", "counters", "per_example", "noise", "sweep_at_scale"):
        assert (BENCH / f"{name}.py").exists()


@pytest.mark.parametrize(
    ("visible", "device", "expected"), [(None, 0, "0"), (None, 2, "2"), ("3,5", 1, "5"), ("GPU-ab", 0, "GPU-ab")]
)
def test_a_stage_sees_the_device_asked_for_as_gpu_0(monkeypatch, tmp_path, visible, device, expected):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Check(device, tmp_path, tmp_path, 1.0).environment["CUDA_VISIBLE_DEVICES"] == expected


STARTS = """
import contextlib, io, json, runpy, sys

folder, starts = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = folder
ends = []
for name, *flags in starts:
    sys.argv = [f"{folder}/{name}.py", *flags]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    ends.append([status or 0, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""


def test_every_script_starts_and_knows_its_flags_and_the_check_says_that_there_is_no_gpu():
    """One after the other in one process, which imports torch once."""
    names = ["gpu_check", "counters", "step", "per_example", "noise", "sweep_at_scale"]
    starts = [*([name, "--help"] for name in names), ["gpu_check"]]
    command = [sys.executable, "-c", STARTS, str(BENCH), json.dumps(starts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *helps, check = json.loads(done.stdout)
    for name, (status, out, err) in zip(names, helps, strict=True):
        assert status == 0, (name, err)
        assert "--output" in out, name
    assert check[0] == 2
    assert "torch sees no GPU 0" in check[2]


def test_what_ncu_prints_is_read():
    metrics = [metric + counters.SUFFIX for metric in counters.NCU.values()]
    rows = [["ID", "Kernel Name", *metrics], ["", "", *["%"] * 4]]
    rows += [["0", "gemm(float, int)", "99.5", "12.5", "90.0", "1,000.0"], ["1", "gemm", "98.5", "11.5", "n/a", "30"]]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    assert counters.parse(text) == [
        {"sm_active": 99.5, "sm_occupancy": 12.5, "dram_active": 1000.0},
        {"sm_active": 98.5, "sm_occupancy": 11.5, "dram_active": 30.0},
    ]
    assert counters.parse("==ERROR== no permission\n") == []


def test_ncu_is_asked_again_without_the_metric_that_a_chip_lacks(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command[command.index("--metrics") + 1].split(","))
        if len(asked[-1]) == 4:
            return subprocess.CompletedProcess(command, 1, "==ERROR== Failed to find metric sm__pipe_tensor", "")
        rows = [["ID", *asked[-1]], ["", *["%"] * 3], ["0", "99", "12", "90"]]
        return subprocess.CompletedProcess(command, 0, "\n".join(",".join(f'"{c}"' for c in row) for row in rows), "")

    monkeypatch.setattr(counters, "ncu", lambda: "ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    assert counters.count("gemm", 1.0) == {"read": {"sm_active": 0.99, "sm_occupancy": 0.12, "dram_active": 0.9}}
    assert len(asked) == 2


def test_norms_are_validated_where_no_peer_is_installed_and_in_autocast(monkeypatch):
    """On a GPU machine without Opacus our own torch products are the witness; a wrong kernel must not be timed."""
    tiny = lambda: per_example.transformer(64, 1, 8, 2)  # noqa: E731
    monkeypatch.setattr(per_example, "CASES", {"tiny": tiny, "tiny" + per_example.BF16: tiny})
    norms = {}
    for case in per_example.CASES:
        side, witness = (per_example.build(kind, case, torch.device("cpu")) for kind in per_example.SIDES[1:3])
        assert witness.recorder is not side.recorder
        norms[case] = side.run()
        torch.testing.assert_close(witness.run(), norms[case], rtol=1e-6, atol=0)
    plain, cast = norms.values()
    assert not torch.equal(plain, cast)
    torch.testing.assert_close(plain, cast, rtol=0.1, atol=0)


def test_the_copy_that_ncu_counts_is_a_kernel(monkeypatch):
    """torch hands a copy between equal layouts on one device to the driver, where ncu profiles nothing."""
    monkeypatch.setattr(counters.torch, "randn", lambda size, device: torch.ones(4, device=device))
    work = counters.work_of("copy", torch.device("cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    names = [event.name for event in profiler.events()]
    assert names == ["aten::neg"]


@pytest.fixture
def toy(tmp_path, monkeypatch, warm_python):
    """A way to run the sweep at scale at a toy scale, in `tmp_path`, as a stage does."""
    found = Check(None, tmp_path, tmp_path / "site", 300.0)
    environment = found.environment | {"OMP_NUM_THREADS": "1", warm.CHILDREN: warm_python}
    command = [warm_python, BENCH / "sweep_at_scale.py", "--device", "cpu", "--kept", "kept", "--output", "o.json"]

    def start(seconds=240.0):
        return subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    return start


def test_a_sweep_at_scale_that_is_killed_goes_on_and_answers_the_question(toy, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    process = toy()
    store = kept / "sweep_at_scale.db"
    deadline = time.monotonic() + 120
    while _trials(store) < 3:  # in the middle of the first batch size, or of the one after it
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(warm.KILL)
    process.wait()
    before = _trials(store)
    measured = (kept / "sweep_at_scale_capacity.json").read_bytes()

    assert toy().wait(timeout=240) in (0, 3)
    figures = json.loads((tmp_path / "o.json").read_text())
    assert [part["part"] for part in figures["parts"]] == ["capacity", "sweep 1", "sweep 2"]
    assert figures["parts"][0]["status"].startswith("kept")
    assert (kept / "sweep_at_scale_capacity.json").read_bytes() == measured
    assert _trials(store) > before >= 3
    assert list(figures["points"]) == ["4", "8", "16", "32", "64"]  # of both sweeps
    assert figures["critical_source"] == "sweep"
    low, critical, high = (figures["critical_batch"][i] for i in (1, 0, 2))
    assert low < critical < high
    verdict = figures["record"]["verdict"]
    assert verdict["critical_batch"] == critical


def test_the_answer_is_the_critical_batch_over_the_saturation_batch():
    record = {
        "capacity": {"saturation_batch": 800.0, "saturation_low": 700.0, "saturation_high": 900.0},
        "verdict": {"critical_batch": 20.0, "critical_low": 15.0, "critical_high": 30.0, "saturation_batch": 800.0},
        "convergence": {"curves": [{"points": [{"batch": 8, "steps": 100.0, "learning_rate": 0.1}]}]},
    }
    found = sweep_at_scale.answer(record)
    assert found["critical_over_saturation"] == 0.025
    assert (found["critical_batch"], found["saturation_batch"]) == ([20.0, 15.0, 30.0], [800.0, 700.0, 900.0])
    assert found["points"] == {8: [100.0, 0.1]}
    record["verdict"]["saturation_batch"] = None
    assert sweep_at_scale.answer(record)["critical_over_saturation"] is None
    assert sweep_at_scale.answer({})["points"] == {}


@pytest.mark.parametrize(
    ("statuses", "critical", "code"),
    [
        (["ok", "ok"], 20.0, 0),
        (["kept from an earlier call", "incomplete"], None, 3),  # no answer yet, and something to go on with
        (["ok", "ok", "skipped"], 20.0, 3),
        (["failed with status 2", "incomplete"], 20.0, 1),
        (["ok", "ok"], None, 1),
    ],
)
def test_a_sweep_at_scale_without_an_answer_yet_is_incomplete_and_not_failed(statuses, critical, code):
    assert sweep_at_scale.exit_status(statuses, critical) == code


def _trials(store):
    """Trials in a store that another process may be making."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM trial").fetchone()[0]
    except sqlite3.Error:
        return 0


def test_a_sweep_at_scale_is_interrupted_when_the_time_ends(tmp_path, monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", warm_python)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    endless = ("--batch", "4", "--seeds", "1", "--target", "train=0.0000001", "--max-steps", "100000000")
    scale = dataclasses.replace(sweep_at_scale.TOY, sweep=(), passes=(endless, ("--batch", "8")))
    stage = sweep_at_scale.Stage(("--cpu",), scale, tmp_path, sweep_at_scale.REPORT_S + sweep_at_scale.GRACE_S + 12.0)
    stage.capacity.write_text("{}")  # kept from an earlier call
    stage.measure()
    assert [(part["part"], part["status"]) for part in stage.parts[1:]] == [("sweep 1", "incomplete")]


def test_the_sweep_at_scale_runs_only_where_it_is_named(tmp_path):
    checks = Check(None, tmp_path, tmp_path, 1.0)
    assert "sweep_at_scale" not in checks.ordered(None)
    assert checks.ordered("sweep_at_scale") == ["build", "sweep_at_scale"]


def test_what_a_sweep_at_scale_asks_for_is_understood():
    for scale in (sweep_at_scale.GPU, sweep_at_scale.TOY):
        smallest = {parse_batches(flags[flags.index("--batch") + 1])[0] for flags in scale.passes}
        assert len(smallest) == 1, "another base batch would give the same trials another limit of steps"
    assert max(parse_batches(sweep_at_scale.GPU.passes[0][1])) == 2**13


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_attention_of_a_gpu_is_stacked_without_a_loop_over_replicas(kind):
    """What the sweep's replicas run through vmap there; a warning, that an operator has no rule, is an error here."""
    attention = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    inputs = [torch.randn(5, 3, 4, 8, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    options = (0.0, True) if kind == "flash" else (None, True, 0.0, True)
    out = torch.vmap(lambda q, k, v: attention(q, k, v, *options)[0])(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in (out, *grads)] == [inputs[0].shape] * 4
