"""The command as a user types it: exit status, what goes where, and every bad input of the main job."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases.patience import with_time
from cases.planted import PlantedClock
from cases.verdicts import SWEEP

from pybatch import cli
from pybatch.base.errors import Interrupted, WorkloadError
from pybatch.capacity import measurement
from pybatch.capacity.probe import Outcome
from pybatch.capacity.step import TrainingStep
from pybatch.device.identity import describe
from pybatch.records import Ceilings, Convergence, NoiseScale, Run
from pybatch.workloads.quadratic import Quadratic
from pybatch.workloads.running.session import Session

USER_WORKLOADS = """
import torch
import pybatch

class Good(pybatch.Workload):
    name, unit = "mine", "points"
    def model(self):
        return torch.nn.Linear(8, 1)
    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 8, generator=generator)
        return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)
    def loss(self, model, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(model(x), y)

class Raises(Good):
    def batch(self, n, generator, split="train"):
        raise KeyError("no such column")

class NotANumber(Good):
    def loss(self, model, batch):
        return super().loss(model, batch) * float("nan")

class PerExample(Good):
    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().squeeze(1)

class ShortBatch(Good):
    def batch(self, n, generator, split="train"):
        return super().batch(7, generator, split)

class NoModel(Good):
    def model(self):
        return None

class Slow(Good):
    def loss(self, model, batch):
        import time
        time.sleep(0.05)
        return super().loss(model, batch)

class Prints(Good):
    print("a line of the workload's own, while it is imported")
    def model(self):
        print("a line of the workload's own")
        return super().model()

class Above64(Good):
    def loss(self, model, batch):
        if len(batch[0]) > 64:
            raise RuntimeError("too many")
        return super().loss(model, batch)

class Even(Good):
    def loss(self, model, batch):
        if len(batch[0]) % 2:
            raise ValueError("an even number of points is needed")
        return super().loss(model, batch)

class Exits(Good):
    def model(self):
        raise SystemExit("bye")

class Pairs(Good):
    def loss(self, model, batch):
        found = model(batch[0])
        return (found - found.T).square().mean()

class Huge(Good):
    def model(self):
        class Model(torch.nn.Linear):
            def to(self, device):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return Model(8, 1)

class NotAWorkload:
    pass
"""


@pytest.fixture
def planted_times(monkeypatch):
    """Steps of 2 ms and 10 us an example on a clock of their own, for what is not about time: none is waited for."""
    loaded, load = [1], TrainingStep.load

    def keep(self, n):
        loaded[0] = n
        return load(self, n)

    def clock_for(device):
        clock = PlantedClock(2e-3, 1e-5)
        clock.batch = lambda: loaded[0]
        return clock

    monkeypatch.setattr(TrainingStep, "load", keep)
    monkeypatch.setattr(measurement, "clock_for", clock_for)
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *arguments: Ceilings(1e11, 1e10))
    monkeypatch.setattr(measurement.Disturbance, "told", lambda self: ())
    monkeypatch.setattr("pybatch.capacity.largest.run_probe", lambda *arguments: Outcome("ok", 3, 1))


@pytest.fixture
def planted_noise(monkeypatch):
    """The noise scale, for what is about the capacity alone."""
    found = NoiseScale(40.0, 31.0, 52.0, 0.5, 20.0, "resolved", "planted", 512)
    monkeypatch.setattr("pybatch.jobs.bench.measure_noise", lambda *arguments, **options: found)


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mymodel.py"
    path.write_text(USER_WORKLOADS)
    return path


@pytest.fixture
def pybatch(monkeypatch, capsys):
    """Type a command; returns (exit status, stdout, stderr)."""

    def type_(*arguments):
        monkeypatch.setattr(sys, "argv", ["pybatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return type_


@pytest.fixture
def measured(monkeypatch, run):
    """Replace the measurement by a ready record; returns the arguments it was called with."""
    import pybatch.jobs.bench

    calls = []

    def run_bench(workload, options, **arguments):
        calls.append((workload, arguments | vars(options)))
        return run

    monkeypatch.setattr(pybatch.jobs.bench, "run_bench", run_bench)
    return calls


def test_flags_reach_the_measurement(pybatch, measured):
    status, out, err = pybatch(
        *shlex.split("bench --cpu --workload text --model lstm --batch 8-32*2 --dtype bf16 --time-budget 7 --seed 3")
    )
    assert (status, err) == (0, "")
    [(workload, arguments)] = measured
    assert (workload.name, workload.model_name) == ("text", "lstm")
    assert arguments["device"] == torch.device("cpu")
    assert arguments["batches"] == (8, 16, 32)
    assert (arguments["dtype"], arguments["time_budget"], arguments["seed"]) == ("bf16", 7.0, 3)
    assert arguments["command"] == (
        "pybatch bench --cpu --workload text --model lstm --batch '8-32*2' --dtype bf16 --time-budget 7 --seed 3"
    )
    assert "Use batch 32." in out


@pytest.mark.parametrize(
    ("flags", "name", "options", "lr"),
    [
        ("", None, {}, None),
        ("--optimizer adamw:lr=3e-4,betas=0.9/0.95", "adamw", {"betas": (0.9, 0.95)}, 3e-4),
        ("--optimizer adamw:lr=3e-4 --lr 1e-2", "adamw", {}, 1e-2),
        ("--lr 1e-2", None, {}, 1e-2),
    ],
)
def test_the_optimizer_reaches_the_measurement(pybatch, measured, flags, name, options, lr):
    status, _, err = pybatch("bench", "--cpu", "--dtype", "fp16", "--reference-batch", "64", *flags.split())
    assert (status, err) == (0, "")
    asked = measured[-1][1]["optimizer"]
    assert (asked.name, asked.options, asked.lr) == (name, options, lr)
    assert (measured[-1][1]["reference_batch"], measured[-1][1]["dtype"]) == (64, "fp16")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr 0", "learning rate 0.0 is out of range"),
        ("--reference-batch 0", "reference batch 0 is out of range"),
        ("--optimizer adamw:lr=fast", "is not a number"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_anything_is_loaded(pybatch, measured, flags, said):
    status, out, err = pybatch("bench", "--cpu", *flags.split())
    assert (status, out, measured) == (2, "", [])
    assert said in err


def test_modes_reach_the_measurement(pybatch, measured):
    for flags, modes in (("", (False, False)), ("--compile", (True, False))):
        pybatch("bench", "--cpu", *flags.split())
        assert (measured[-1][1]["compile"], measured[-1][1]["graph"]) == modes


def test_the_format_goes_to_stdout_alone(pybatch, measured, run):
    status, out, err = pybatch("bench", "--cpu", "--format", "json")
    assert (status, err) == (0, "")
    assert Run.from_json(out) == run


def test_output_takes_the_result_and_stdout_the_table(pybatch, measured, run, tmp_path):
    path = tmp_path / "run.json"
    status, out, err = pybatch("bench", "--cpu", "-o", path)
    assert status == 0
    assert Run.from_json(path.read_text()) == run
    assert "Use batch 32." in out
    assert err == f"pybatch: wrote {path}\n"


def test_format_outranks_the_ending(pybatch, measured, tmp_path):
    pybatch("bench", "--cpu", "-o", tmp_path / "run.txt", "--format", "csv")
    assert (tmp_path / "run.txt").read_text().startswith("created,")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_with_the_remedy(pybatch, measured):
    status, out, err = pybatch("bench", "--gpu", "0")
    assert (status, out) == (2, "")
    assert "--cpu" in err
    assert not measured


@pytest.mark.parametrize(("index", "says"), [("2", "the GPUs here are 0..1"), ("-1", "-1")])
def test_a_device_index_out_of_range_is_said_with_the_range(pybatch, measured, monkeypatch, index, says):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, out, err = pybatch("bench", "--gpu", index)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not measured


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--batch 8-4*2", "batch '8-4*2': start 8 is above stop 4. Write '4-8*2'."),
        ("--batch many", "'many' is not a batch size or a range"),
        ("--workload digit", "digits"),
        ("--workload nofile.py:Thing", "nofile.py"),
        ("--model resnet152", "resnet152"),
        ("--dtype fp8", "dtype 'fp8' is not known"),
        ("--format xml", "format 'xml' is not known. Use one of: table, md, json, jsonl, csv."),
        ("--gpu 0 --cpu", "--gpu and --cpu exclude each other"),
        ("--cuda-graph", "CUDA graphs were asked for (--cuda-graph, graph=True) on cpu: only a CUDA device"),
        ("--time-budget 0", "time budget 0 s is out of range"),
        ("--time-budget nan", "time budget nan s is out of range"),
        ("--seed -1", "seed -1 is out of range"),
        ("-o run.xls", "'run.xls' ends in no format known here"),
        ("-o no/such/folder/run.json", "'no/such/folder/run.json' cannot be written: No such file or directory"),
        ("-o /", "ends in no format"),
        ("--batch", "--batch"),
        ("--bach 8", "--bach"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(pybatch, monkeypatch, arguments, says, tmp_path):
    import pybatch.jobs.bench as job

    monkeypatch.setattr(job, "measure_capacity", lambda *a, **k: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    device = () if "--gpu" in arguments else ("--cpu",)
    status, out, err = pybatch("bench", *device, *arguments.split())
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raises", "Raises.batch() of workload 'mine' raised KeyError: 'no such column'"),
        ("NotANumber", "NotANumber.loss() of workload 'mine' returned nan"),
        ("PerExample", "PerExample.loss() of workload 'mine' returned torch.float32 of shape ("),
        ("ShortBatch", "ShortBatch.batch() of workload 'mine' was asked for"),
        ("NoModel", "NoModel.model() of workload 'mine' returned NoneType"),
        ("Exits", "Exits.model() of workload 'mine' raised SystemExit: bye"),
        ("NotAWorkload", "NotAWorkload"),
        ("Goood", "Good"),
    ],
)
def test_a_faulty_workload_is_named_with_its_method(pybatch, user_file, name, says):
    status, out, err = pybatch("bench", "--cpu", "--workload", f"{user_file}:{name}", "--time-budget", "5")
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", ["", "--thorough", "--compile"])
def test_a_model_that_does_not_fit_on_the_device_is_said_before_anything_is_written(
    pybatch, user_file, tmp_path, flags
):
    path = tmp_path / "run.json"
    status, out, err = pybatch("bench", "--cpu", "--workload", f"{user_file}:Huge", "-o", path, *flags.split())
    assert (status, out, list(tmp_path.iterdir())) == (2, "", [])
    assert "pybatch: the model of workload 'mine' (36 B) does not fit on cpu, out of memory: OutOfMemoryError" in err
    assert "Take a smaller model" in err


def test_a_user_workload_runs_end_to_end(pybatch, user_file, tmp_path):
    path = tmp_path / "run.json"
    command = ("bench", "--cpu", "--workload", f"{user_file}:Good", "--batch", "8-512*4", "-o", path)
    status, out, _ = with_time(
        lambda budget: pybatch(*command, "--time-budget", f"{budget:g}"), lambda done: done[0] == 0, 25
    )
    run = Run.from_json(path.read_text())
    assert (status, run.complete, run.notes) == (0, True, ())
    assert [p.batch for p in run.capacity.batches if p.status == "ok"] == [8, 32, 128, 512]
    assert run.capacity.workload.name == "mine"
    assert run.noise.status == "resolved"
    assert run.noise.steps >= 8
    said = " ".join(out.split())
    assert run.verdict.answer in said
    assert run.verdict.because in said


@pytest.mark.parametrize("command", ["bench --time-budget 8", "sweep --batch 8,16 --rates 0.1 --seeds 1 --max-steps 9"])
def test_what_a_workload_prints_stays_out_of_the_result(pybatch, user_file, command):
    kinds = [*shlex.split(command), *(["--target", "train=1e-9", "--noise-budget", "0"] if "sweep" in command else [])]
    _, out, err = pybatch(*kinds, "--cpu", "--workload", f"{user_file}:Prints", "--format", "json", "-q")
    assert json.loads(out)["workload"]["name"] == "mine"
    assert "a line of the workload's own" in err


def test_the_plan_of_a_dry_run_goes_to_stdout_and_prints_of_the_workload_do_not(pybatch, user_file):
    status, out, _ = pybatch("bench", "--cpu", "--dry-run", "--workload", f"{user_file}:Prints")
    assert status == 0
    assert out.startswith("workload  mine")
    assert "own" not in out


def test_a_budget_too_short_is_incomplete_and_says_so(pybatch, user_file):
    command = ("bench", "--cpu", "--workload", f"{user_file}:Slow", "--batch", "1,2,4", "--time-budget", "2")
    status, out, _ = pybatch(*command, "--format", "json")
    data = json.loads(out)
    assert (status, data["complete"]) == (3, False)
    assert any("the time budget of 2 s did not suffice; raise --time-budget" in note["text"] for note in data["notes"])


@pytest.mark.usefixtures("planted_times", "planted_noise")
def test_a_model_that_runs_only_at_some_batch_sizes_gives_those_and_is_incomplete(pybatch, user_file):
    command = ("bench", "--cpu", "--workload", f"{user_file}:Even", "--batch", "2,3,4,8", "--time-budget", "15")
    status, out, _ = pybatch(*command, "--format", "json")
    data = json.loads(out)
    assert (status, data["complete"]) == (3, False)
    assert [(b["batch"], b["status"]) for b in data["batches"]] == [(2, "ok"), (3, "skipped"), (4, "ok"), (8, "ok")]
    assert "ValueError: an even number of points is needed" in data["batches"][1]["reason"]
    assert data["capacity"]["model"] is not None
    assert [note["text"] for note in data["notes"]] == ["the workload refuses batch 3; each one's reason says how"]


@pytest.mark.usefixtures("planted_times", "planted_noise")
def test_memory_that_is_not_linear_gives_what_was_measured_and_a_batch_that_ran_or_the_reason(
    pybatch, user_file, monkeypatch
):
    from pybatch.capacity import largest, probe

    limit, matrices = 512 << 20, 3  # of fp32, n x n, that a step holds at its peak

    def run_probe(request, timeout_s):
        fits = matrices * 4 * request.batch**2 <= limit
        return probe.Outcome("ok", 3, 1) if fits else probe.Outcome("oom", reason="MemoryError")

    monkeypatch.setattr(largest, "memory_limit", lambda device: limit)
    monkeypatch.setattr(largest, "run_probe", run_probe)
    command = ("bench", "--cpu", "--workload", f"{user_file}:Pairs", "--batch", "64,128,256,512", "--time-budget", "20")
    status, out, _ = pybatch(*command, "--format", "json")
    data = json.loads(out)
    assert status == (0 if data["complete"] else 3)
    assert "ok" in [b["status"] for b in data["batches"]]
    found = data["capacity"]
    if found["max_batch_verified"]:  # there was time to step down from what a line predicts
        assert matrices * 4 * found["max_batch"] ** 2 <= limit
    else:
        why = [note["text"] for note in found["notes"] if note["figure"].startswith("capacity.max_batch")]
        assert why


@pytest.mark.usefixtures("planted_times")
def test_a_batch_the_workload_refuses_is_never_advised(pybatch, user_file, tmp_path):
    path = tmp_path / "run.json"
    command = ("bench", "--cpu", "--workload", f"{user_file}:Above64", "--time-budget", "20")
    status, out, _ = pybatch(*command, "-o", path)
    data = json.loads(path.read_text())
    assert status == 3
    assert 64 <= data["capacity"]["max_batch"] < 128
    assert data["verdict"]["best_batch"] < 128
    assert "Above64.loss() of workload 'mine' raised RuntimeError: too many" in " ".join(out.split())


def test_any_locale_takes_any_format(run, tmp_path):
    """In a C locale without UTF-8 mode nothing is lost: the file is UTF-8, and stdout replaces what it lacks."""
    (tmp_path / "record.json").write_text(run.to_json())
    code = (
        "import sys, pathlib, pybatch.cli as cli; from pybatch import Run; from pybatch.report.output import Output\n"
        "from pybatch.commands.measuring import deliver\n"
        "run = Run.from_json(pathlib.Path('record.json').read_text())\n"
        "def app(**_):\n"
        "    for format_ in sys.argv[1:]:\n"
        "        deliver(run, format_, Output(pathlib.Path(format_))); deliver(run, format_, None)\n"
        "cli.app = app; cli.main()"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    formats = ["table", "md", "json", "jsonl", "csv"]
    command = [sys.executable, "-c", code, *formats]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert all(len((tmp_path / name).read_text(encoding="utf-8")) > 300 for name in formats)
    assert len(done.stdout.decode("ascii")) > 1500


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_file_that_fails_at_the_end_loses_nothing(pybatch, measured, run):
    status, out, err = pybatch("bench", "--cpu", "-o", "/dev/full", "--format", "json")
    assert status == 3
    assert Run.from_json(out) == run
    assert "'/dev/full' cannot be written: No space left on device. The result follows on stdout." in err


@pytest.mark.parametrize(("format_", "first"), [("json", "{"), ("table", "digits (mlp, 4,810 parameters, fp32) on ")])
def test_a_reader_that_leaves_early_is_no_failure(run, tmp_path, format_, first):
    (tmp_path / "record.json").write_text(run.to_json())
    code = (
        "import pathlib, pybatch.cli as cli; from pybatch import Run\n"
        "from pybatch.commands.measuring import deliver\n"
        "run = Run.from_json(pathlib.Path('record.json').read_text())\n"
        f"cli.app = lambda **_: [deliver(run, {format_!r}, None) for _ in range(50)] and 0; cli.main()"
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "$0" | head -1', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = "pybatch: stdout was closed before the end of the result. Give -o FILE to keep it.\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert done.stdout.startswith(first)
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_failure_and_mixes_nothing(pybatch, measured, run, monkeypatch, tmp_path, closed):
    path = tmp_path / "run.json"
    monkeypatch.setattr(sys, closed, None)
    status, out, err = pybatch("bench", "--cpu", "-o", path)
    getattr(sys, closed).close()  # what took its place
    assert status == 0
    assert Run.from_json(path.read_text()) == run
    if closed == "stdout":
        assert (out, "wrote" in err) == ("", True)
    else:
        assert ("Capacity" in out, "wrote" in out, err) == (True, False, "")


def test_ctrl_c_before_anything_was_measured_says_so(pybatch, monkeypatch, tmp_path):
    from pybatch.device import identity

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(identity, "resolve", interrupt)
    status, out, err = pybatch("bench", "-o", tmp_path / "run.json")
    assert (status, out) == (130, "")
    assert "interrupted before anything was measured" in err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_noise_measurement_keeps_the_capacity(pybatch, user_file, monkeypatch, tmp_path, run):
    import pybatch.jobs.bench as job

    def fail(*arguments, **options):
        raise WorkloadError("Good.loss() of workload 'mine' returned nan at warm-up step 7.")

    monkeypatch.setattr(job, "measure_capacity", lambda *arguments, **options: run.capacity)
    monkeypatch.setattr(job, "measure_noise", fail)
    path = tmp_path / "run.json"
    status, out, _ = pybatch("bench", "--cpu", "--workload", f"{user_file}:Good", "--batch", "8-64*2", "-o", path)
    found = Run.from_json(path.read_text())
    assert status == 3
    assert found.capacity == run.capacity
    assert found.noise is None
    assert "returned nan at warm-up step 7" in found.notes[0].text
    assert "returned nan at warm-up step 7" in " ".join(out.split())


def test_an_interrupted_run_is_delivered(pybatch, monkeypatch, run):
    import pybatch.jobs.bench as job

    def interrupt(*arguments, **options):
        raise Interrupted(run.capacity)

    monkeypatch.setattr(job, "measure_capacity", interrupt)
    status, out, _ = pybatch("bench", "--cpu", "--format", "json")
    data = json.loads(out)
    assert status == 3
    assert data["complete"] is False
    assert len(data["batches"]) == 5
    assert data["verdict"]["text"]
    assert "interrupted" in data["notes"][0]["text"]


def test_ctrl_c_while_the_command_line_is_imported_shows_no_trace(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "pybatch", "list"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "pybatch: interrupted before anything was measured; nothing was written\n"


def test_ctrl_c_writes_what_was_measured(user_file, tmp_path):
    """The real thing: a process, a signal, a file."""
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pybatch", "bench", "--cpu", "--workload", f"{user_file}:Slow"]
    command += ["--batch", "1-4096*2", "--time-budget", "40", "-o", str(path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run.json.partial").exists():  # batch sizes are known by then
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    run = Run.from_json(path.read_text())
    assert not run.complete
    assert run.capacity is not None
    assert "Traceback" not in err


def test_doctor_says_what_is_compiled_and_why_a_counter_is_missing(pybatch):
    status, out, _ = pybatch("doctor")
    assert status == 0
    for word in ("cpp", "cuda", "triton", "vector", "sm_active"):
        assert word in out
    assert " ".join(out.split()).count("a GPU's counter; this run is on a CPU") <= 1  # one line, whatever it is of


def test_list_names_what_ships(pybatch):
    status, out, _ = pybatch("list")
    assert status == 0
    for word in ("digits", "text", "mlp", "transformer", "SGD", "AdamW"):
        assert word in out


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"GOMP_SPINCOUNT": "5000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "100"}, {"GOMP_SPINCOUNT": "100"}),
    ],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(pybatch, monkeypatch, given, kept):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    pybatch("--version")
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == kept
    from pybatch.device.environment import capture

    assert kept.items() <= capture(seed=0).variables.items()


@pytest.mark.parametrize(("flags", "doublings"), [(["--quick"], 2), ([], 1)])
def test_a_quick_run_quadruples_the_batch_from_one_size_to_the_next(pybatch, monkeypatch, flags, doublings):
    """Half as many sizes, each timed twice as long: 25 s do not suffice for all."""
    seen = []

    def explore_doubling(explorer, deadline, limit, last, at_a_go, runs):
        seen.append(at_a_go)
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement, "explore_doubling", explore_doubling)
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))
    pybatch("bench", "--cpu", *flags)
    assert seen == [doublings]


@pytest.mark.usefixtures("planted_times", "planted_noise")
def test_a_batch_above_the_data_set_says_how_it_is_drawn(pybatch):
    _, out, _ = pybatch("bench", "--cpu", "--batch", "512,1024,2048", "--time-budget", "20", "--format", "json")
    notes = {note["figure"]: note["text"] for note in json.loads(out)["capacity"]["notes"]}
    assert "above the 1,437 training examples repeats some of them" in notes["batches.batch"]
    assert "with replacement" in notes["batches.batch"]


def test_version_and_help(pybatch):
    from importlib.metadata import version

    assert pybatch("--version")[:2] == (0, f"pybatch {version('pybatch')}\n")
    status, out, _ = pybatch("bench", "--help")
    assert status == 0
    assert "16-4096*2" in out


def test_a_sweep_beside_a_bench_is_looked_at_before_anything_is_measured(pybatch, tmp_path):
    """`--sweep`: one sweep, of this workload; a run or a store with none or several is refused by name."""
    work = Quadratic()
    info, device = Session(work, torch.device("cpu")).info, describe(torch.device("cpu"))
    steps = Convergence((SWEEP["fitted"][0],), optimizer="sgd", device=device, workload=info)
    then, paths = "2026-01-03T00:00:00+00:00", {}
    for name, run in {"good": Run(then, None, convergence=steps), "none": Run(then, None)}.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(run.to_json())
    status, out, err = pybatch(*shlex.split(f"bench --cpu --workload quadratic --dry-run --sweep {paths['good']}"))
    assert status == 0, err
    assert f"verdict   on the sweep of {then}" in out
    for flags, told in (
        (f"--workload quadratic --sweep {paths['none']}", "none.json' holds no sweep. Give the record of one"),
        (f"--workload digits --sweep {paths['good']}", "--sweep: it is of quadratic, fp32, on"),
        (f"--workload quadratic --option d=7 --sweep {paths['good']}", "with other options or another model file"),
        (f"--workload quadratic --sweep {tmp_path}/missing.json", "cannot be read"),
    ):
        status, _, err = pybatch(*shlex.split(f"bench --cpu --dry-run {flags}"))
        assert status == 2
        assert told in " ".join(err.split())
