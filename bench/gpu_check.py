"""Everything that needs a GPU, in one command of under ten minutes: build, tests, sanitizer, kernels, `pybatch bench`.

    python bench/gpu_check.py [--device 0] [--output DIR] [--only STAGE[,STAGE]] [--seconds 570] [--site DIR] [--cpu]

Needs no registry: only python3 with torch, triton, numpy, scipy, scikit-learn, rich, typer, psutil, threadpoolctl,
nvidia-ml-py, pytest, pytest-benchmark, hypothesis, scikit-build-core, pybind11, cmake and ninja, and nvcc on PATH.
pybatch is installed beside, for the device's own architecture alone; with --site it stays there for a second call.
Each stage is a process of its own with a time limit, so one that hangs or crashes costs its own result only; a stage
that no longer fits before --seconds are over is skipped. DIR gets two files, rewritten after every stage:
`gpu_check.json`, the summary with every stage's figures, and `gpu_check.tar.gz`, the logs and figures as files. Exit
status 1 where a stage failed. --cpu tries this script itself where there is no GPU.

`sweep_at_scale` takes a whole call, so it runs only where it is named; DIR then also gets what a later call goes on
with. The calls, where a machine is lent for a while at a time and only OUT comes back from it:
    1  python3 bench/gpu_check.py --output OUT/gpu
    2  python3 bench/gpu_check.py --output OUT/gpu --only sweep_at_scale
    3  mkdir -p OUT/gpu && cp EARLIER/gpu/sweep_at_scale* OUT/gpu/ &&
       python3 bench/gpu_check.py --output OUT/gpu --only sweep_at_scale
Call 3 only where 2 says "incomplete" or was killed; EARLIER is what came back from it, store, -wal and -shm together.
With less time than 570 s, give --seconds: what is finished until then is in the summary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 3000  # characters of a stage's log kept in the summary
LEAST_S = 15.0  # a stage that is given less shows nothing
GRACE_S = 5.0  # for a stage stopped at its limit to print what it has found
# Of the tests: those against a reference, then graphs; a cut leaves out what tells least.
TESTS_FIRST = ("optim/test_gpu.py", "optim/test_capture.py")
# What matters most comes first, in case the time or the machine goes; stages not named here come last.
ORDER = (
    "build",
    "doctor",
    "tests",
    "step",
    "bench_text_size_base",
    "bench_digits_size_base",
    "bench_scenes_size_base",
    "counters",
    "sanitizer_memcheck",
    "sanitizer_racecheck",
    "tests_triton",
    "noise",
    "per_example",
    "roofs",
)
ON_REQUEST = ("sweep_at_scale",)  # stages that run only where --only names them


@dataclass
class Outcome:
    """One stage: `status` is ok, incomplete, failed, timeout or skipped, the last with the reason in `detail`."""

    stage: str
    status: str
    seconds: float
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Check:
    """The stages on one device; every command runs with the freshly built pybatch on its path.

    Args:
        device: index of the GPU as torch numbers it; None: this CPU.
        output: folder of the stages' logs and figures.
        site: where pybatch is installed.
        seconds: after which nothing runs any more.
        kept: folder of what a stage of a later call goes on with; None: `output`.
    """

    def __init__(self, device: int | None, output: Path, site: Path, seconds: float, kept: Path | None = None) -> None:
        self.device, self.output, self.site, self.kept = device, output, site, kept or output
        self.end = time.monotonic() + seconds
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range((device or 0) + 1)))
        paths = [str(site), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": "" if device is None else visible.split(",")[device],  # the stages' GPU 0
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(
        self, stage: str, command: Sequence[str], limit: float, incomplete: int | None = None, **environment: str
    ) -> tuple[str, str, float]:
        """(status, log, seconds); the log is also written to the output folder.

        `incomplete` is the exit status of a command that gave its figures but for some.
        """
        start, limit = time.monotonic(), max(1.0, min(limit, self.left))
        with (self.output / f"{stage}.log").open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                command,
                cwd=self.output,  # not the checkout: its sources must not shadow the build
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | environment,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                status = "ok" if code == 0 else "incomplete" if code == incomplete else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # pytest then says what failed until now
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its children, which may hold the device
                process.wait()
                status = "timeout"
            log.seek(0)
            return status, log.read(), time.monotonic() - start

    # The stages, in order.

    def build(self) -> Outcome:
        """Install for this device's architecture, without a registry."""
        import torch

        built, now = self.site / "built_from", sources()
        if built.exists() and built.read_text() == now:
            return Outcome("build", "ok", 0.0, f"kept from an earlier call in {self.site}")
        built.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--upgrade"]
        command += ["--target", str(self.site), str(ROOT)]
        if self.device is None:
            architecture, how = "none", {"PYBATCH_CUDA": "off"}
        else:
            number = "".join(map(str, torch.cuda.get_device_capability(self.device)))
            architecture, how = f"sm_{number}", {"PYBATCH_CUDA": "on", "CUDAARCHS": f"{number}-real"}
        status, log, seconds = self.run("build", command, 240, **how)
        if status == "ok":
            built.write_text(now)
        return Outcome("build", status, seconds, log[-TAIL:], {"architecture": architecture})

    def doctor(self) -> Outcome:
        """What is compiled, and which counters can be read here."""
        status, log, seconds = self.run("doctor", [sys.executable, "-m", "pybatch", "doctor"], 60)
        return Outcome("doctor", status, seconds, log[-2 * TAIL :])

    def tests(self, stage: str = "tests", chosen: str = "not triton") -> Outcome:
        """The tests marked gpu; those of Triton's backend are a stage of their own, which compiles for minutes."""
        if missing := [name for name in ("pytest", "hypothesis", "pytest_benchmark") if find_spec(name) is None]:
            return Outcome(stage, "skipped", 0.0, f"not installed here: {', '.join(missing)}")
        report = self.output / f"{stage}.xml"
        files, which = [ROOT / "tests/kernels/test_plan.py"], ["-m", "not gpu"]
        if self.device is not None:  # by their text: collecting every test takes each worker many seconds
            first = [ROOT / "tests" / name for name in TESTS_FIRST]
            rest = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
            files = [*first, *(p for p in rest if p not in first)]
            which = ["-m", "gpu", "-k", chosen]
        command = [sys.executable, "-m", "pytest", *map(str, files), *which, "-q", "-p", "no:cacheprovider"]
        command += [
            "--tb=short",
            "-o",
            "filterwarnings=default",
        ]  # a warning of this machine's torch says nothing of pybatch
        command += ["--continue-on-collection-errors"]  # a file that needs a library that is not here
        if find_spec("xdist") is not None:
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        status, log, seconds = self.run(stage, [*command, f"--junitxml={report}", f"--rootdir={ROOT}"], 150)
        first = log.partition("= FAILURES =")[2][
            : TAIL // 2
        ]  # where it is one fault, its place says more than the list
        figures = {"closing_line": log.strip().rpartition("\n")[2]}
        return Outcome(
            stage, status, seconds, f"{first}\n[...]\n{log[-TAIL // 2 :]}" if first else log[-TAIL:], figures
        )

    def sanitizer(self, tool: str) -> Outcome:
        """compute-sanitizer over the trap list, on pybatch's kernels.

        torch's own libraries ask the driver for functions that it may lack, and such a refusal counts as an error.
        """
        stage, program = f"sanitizer_{tool}", shutil.which("compute-sanitizer")
        if program is None:
            return Outcome(stage, "skipped", 0.0, "compute-sanitizer is not on PATH")
        ours = ["--kernel-name", "kernel_substring=pybatch", "--report-api-errors", "no"]
        command = [program, "--tool", tool, *ours, "--error-exitcode", "9"]
        command += [sys.executable, str(ROOT / "bench/gpu_traps.py")]
        status, log, seconds = self.run(stage, command, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return Outcome(stage, status, seconds, log[-TAIL:])

    def script(self, name: str, limit: float, *arguments: str, incomplete: int | None = None) -> Outcome:
        """A benchmark script that writes its figures with --output; `incomplete` as of `run`."""
        if not (ROOT / "bench" / f"{name}.py").exists():
            return Outcome(name, "skipped", 0.0, f"there is no bench/{name}.py")
        figures = self.output / f"{name}.json"
        place = "cpu" if self.device is None else "cuda"
        command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--device", place, "--output", str(figures)]
        status, log, seconds = self.run(name, [*command, *arguments], limit, incomplete)
        return Outcome(name, status, seconds, log[-TAIL:], _loaded(figures))

    def sweep_at_scale(self) -> Outcome:
        """Critical batch against saturation batch at batches to 2^13, in all the time there is."""
        seconds = max(1.0, self.left - 5.0)  # it ends by itself before it is killed
        return self.script(
            "sweep_at_scale", self.left, "--seconds", f"{seconds:.0f}", "--kept", str(self.kept), incomplete=3
        )

    def bench(self, workload: str, dtype: str, *flags: str) -> Outcome:
        """`pybatch bench --gpu 0` on one workload."""
        stage = "_".join(["bench", workload, *(flag.strip("-") for flag in flags)])
        figures = self.output / f"{stage}.json"
        command = [
            sys.executable,
            "-m",
            "pybatch",
            "bench",
            "--gpu",
            "0",
            "--workload",
            workload,
            "--dtype",
            dtype,
            *flags,
        ]
        if self.device is None:
            command = [part for part in command if part not in ("--gpu", "0")] + ["--cpu", "--batch", "1,2,4"]
        status, log, seconds = self.run(stage, [*command, "--time-budget", "40", "-o", str(figures)], 90, incomplete=3)
        return Outcome(stage, status, seconds, log[-TAIL:], _loaded(figures))

    def stages(self) -> dict[str, Callable[[], Outcome]]:
        """Every stage by name."""
        return {
            "build": self.build,
            "tests": self.tests,
            "tests_triton": lambda: self.tests("tests_triton", "triton"),
            "step": lambda: self.script("step", 150, "--repeats", "15"),
            "bench_digits": lambda: self.bench("digits", "fp32"),
            "bench_text": lambda: self.bench("text", "bf16"),
            "bench_scenes": lambda: self.bench("scenes", "bf16"),
            "bench_digits_cuda-graph": lambda: self.bench("digits", "fp32", "--cuda-graph"),
            "bench_text_compile": lambda: self.bench("text", "bf16", "--compile"),
            "roofs": lambda: self.script(
                "roofs", 90, "--dtype", "bf16", "--rounds", "4", "--seconds", "1", "--attempts", "2"
            ),
            "sanitizer_memcheck": lambda: self.sanitizer("memcheck"),
            "sanitizer_racecheck": lambda: self.sanitizer("racecheck"),
            "per_example": lambda: self.script("per_example", 90, "--repeats", "11"),
            "noise": lambda: self.script("noise", 90, "--seconds", "3"),
            "doctor": self.doctor,
            "counters": lambda: self.script("counters", 90),
            "sweep_at_scale": self.sweep_at_scale,
            "bench_text_size_base": lambda: self.bench("text", "bf16", "--size", "base"),
            "bench_digits_size_base": lambda: self.bench("digits", "bf16", "--size", "base"),
            "bench_scenes_size_base": lambda: self.bench("scenes", "bf16", "--size", "base"),
        }

    def ordered(self, only: str | None) -> list[str]:
        """Names of the stages to run; raises ValueError for one that does not exist."""
        known = self.stages()
        if only is None:
            last = [name for name in known if name not in (*ORDER, *ON_REQUEST)]
            return [name for name in ORDER if name in known] + last
        asked = [name.strip() for name in only.split(",")]
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"no stage {', '.join(unknown)}. There are: {', '.join(known)}.")
        return ["build", *(name for name in asked if name != "build")]

    def outcome(self, name: str) -> Outcome:
        """Run a stage, whatever happens in it."""
        if name != "build" and self.left < LEAST_S:
            return Outcome(name, "skipped", 0.0, "no time was left for it; name it with --only in a call of its own")
        start = time.monotonic()
        try:
            return self.stages()[name]()
        except Exception:  # of this script, not of the stage's process: the other stages still count
            return Outcome(name, "failed", time.monotonic() - start, traceback.format_exc()[-TAIL:])


def sources() -> str:
    """A digest of what a build is made from: a site of other sources must not pass for one of these."""
    folders = [ROOT / name for name in ("pybatch", "csrc", "kernels")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    digest = hashlib.sha256()
    for path in sorted([*files, ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _loaded(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded


def _environment(device: int | None) -> dict[str, Any]:
    import torch

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    if device is None:
        return {"device": "cpu"} | found
    query = ["nvidia-smi", f"--id={device}", "--format=csv,noheader", "--query-gpu=name,driver_version,clocks.sm"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = ""
    return {"device": torch.cuda.get_device_name(device), "nvidia_smi": smi or None} | found


def check(stages: Sequence[str], checks: Check, environment: dict[str, Any], output: Path) -> list[Outcome]:
    """Run the stages, print a line for each, and write both files after each; nothing runs after a failed build."""
    outcomes: list[Outcome] = []
    for name in stages:
        last = checks.outcome(name)
        outcomes.append(last)
        print(f"{last.stage:26} {last.status:8} {last.seconds:6.1f} s", flush=True)
        summary = {"environment": environment, "stages": [asdict(outcome) for outcome in outcomes]}
        (output / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
        with tarfile.open(output / "gpu_check.tar.gz", "w:gz") as archive:
            archive.add(checks.output, "gpu_check")
        if name == "build" and last.status != "ok":
            break
    return outcomes


def main() -> int:
    """Run the stages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--cpu", action="store_true", help="try this script without a GPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for the two files")
    parser.add_argument("--only", help="stages to run, comma-separated, in this order; build is always run")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything")
    parser.add_argument("--site", type=Path, help="install pybatch here, and keep it for the next call")
    parser.add_argument("--dry-run", action="store_true", help="say which stages would run")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        parser.exit(2, "gpu_check: torch is not installed for this python. Install it first.\n")
    if not arguments.cpu and not 0 <= arguments.device < torch.cuda.device_count():
        parser.exit(2, f"gpu_check: torch sees no GPU {arguments.device}; this check needs one. See --cpu.\n")
    device = None if arguments.cpu else arguments.device
    with tempfile.TemporaryDirectory(prefix="pybatch-gpu-check-") as folder:
        site = (arguments.site or Path(folder) / "site").resolve()
        output: Path = arguments.output.resolve()
        checks = Check(device, Path(folder) / "stages", site, arguments.seconds, kept=output)
        try:
            stages = checks.ordered(arguments.only)
        except ValueError as error:
            parser.exit(2, f"gpu_check: {error}\n")
        if arguments.dry_run:
            print("\n".join(stages))
            return 0
        for needed in (output, checks.output):
            needed.mkdir(parents=True, exist_ok=True)
        outcomes = check(stages, checks, _environment(device), output)
    for outcome in outcomes:
        if outcome.status in ("incomplete", "failed", "timeout"):
            print(f"\n--- {outcome.stage} ({outcome.status}), end of its log ---\n{outcome.detail}")
    return int(any(outcome.status in ("failed", "timeout") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
