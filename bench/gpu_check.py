"""Everything that needs a GPU, in one command of under ten minutes: build, tests, sanitizer, kernels, `pybatch bench`.

    python bench/gpu_check.py [--device 0] [--output DIR] [--only STAGE[,STAGE]]

Needs no registry: only python3 with torch, triton, numpy, scipy, scikit-learn, rich, typer, psutil, nvidia-ml-py,
pytest, scikit-build-core, pybind11, cmake and ninja, and nvcc on PATH. pybatch is installed beside, for the device's
own architecture alone, into a folder that is removed afterwards. Each stage is a process of its own with a time limit,
so one that hangs or crashes costs its own result only. DIR gets `gpu_check.json` (the summary), the log of each stage,
and the figures to commit as `bench/results/<device>.json`. Exit status 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 3000  # characters of a stage's log kept in the summary


@dataclass
class Outcome:
    """One stage: `status` is ok, failed, timeout or skipped, the last with the reason in `detail`."""

    stage: str
    status: str
    seconds: float
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Check:
    """The stages on one device; every command runs with the freshly built pybatch on its path."""

    def __init__(self, device: int, output: Path, site: Path) -> None:
        self.device, self.output, self.site = device, output, site
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", str(device)),
            "PYTHONUNBUFFERED": "1",
        }

    def run(self, stage: str, command: Sequence[str], limit: float, **environment: str) -> tuple[str, str, float]:
        """(status, log, seconds); the log is also written to the output folder."""
        start = time.monotonic()
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
                status = "ok" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with its children, which may hold the device
                process.wait()
                status = "timeout"
            log.seek(0)
            return status, log.read(), time.monotonic() - start

    # The stages, in order.

    def build(self) -> Outcome:
        """Install for this device's architecture, without a registry."""
        import torch

        major, minor = torch.cuda.get_device_capability(self.device)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target"]
        status, log, seconds = self.run(
            "build", [*pip, str(self.site), str(ROOT)], 240, PYBATCH_CUDA="on", CUDAARCHS=f"{major}{minor}-real"
        )
        return Outcome("build", status, seconds, log[-TAIL:], {"architecture": f"sm_{major}{minor}"})

    def tests(self) -> Outcome:
        """The tests marked gpu."""
        report = self.output / "tests.xml"
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["-o", "filterwarnings=default"]  # a warning of this machine's torch says nothing of pybatch
        status, log, seconds = self.run("tests", [*command, f"--junitxml={report}", f"--rootdir={ROOT}"], 180)
        return Outcome("tests", status, seconds, log[-TAIL:], {"closing_line": log.strip().rpartition("\n")[2]})

    def sanitizer(self, tool: str) -> Outcome:
        """compute-sanitizer over the trap list."""
        stage, program = f"sanitizer_{tool}", shutil.which("compute-sanitizer")
        if program is None:
            return Outcome(stage, "skipped", 0.0, "compute-sanitizer is not on PATH")
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(ROOT / "bench/gpu_traps.py")]
        status, log, seconds = self.run(stage, command, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        return Outcome(stage, status, seconds, log[-TAIL:])

    def script(self, name: str, limit: float, *arguments: str) -> Outcome:
        """A benchmark script that writes its figures with --output."""
        if not (ROOT / "bench" / f"{name}.py").exists():
            return Outcome(name, "skipped", 0.0, f"there is no bench/{name}.py")
        figures = self.output / f"{name}.json"
        command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--device", "cuda", "--output", str(figures)]
        status, log, seconds = self.run(name, [*command, *arguments], limit)
        return Outcome(name, status, seconds, log[-TAIL:], _loaded(figures))

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
        status, log, seconds = self.run(stage, [*command, "--time-budget", "45", "-o", str(figures)], 90)
        return Outcome(stage, status, seconds, log[-TAIL:], _loaded(figures))

    def stages(self) -> dict[str, Callable[[], Outcome]]:
        """Every stage by name; the first ones matter most, in case the machine is taken away."""
        return {
            "build": self.build,
            "tests": self.tests,
            "step": lambda: self.script("step", 120, "--repeats", "21"),
            "bench_digits": lambda: self.bench("digits", "fp32"),
            "bench_text": lambda: self.bench("text", "bf16"),
            "bench_scenes": lambda: self.bench("scenes", "bf16"),
            "bench_digits_cuda-graph": lambda: self.bench("digits", "fp32", "--cuda-graph"),
            "bench_text_compile": lambda: self.bench("text", "bf16", "--compile"),
            "roofs": lambda: self.script("roofs", 60, "--dtype", "bf16", "--rounds", "4", "--seconds", "1"),
            "sanitizer_memcheck": lambda: self.sanitizer("memcheck"),
            "sanitizer_racecheck": lambda: self.sanitizer("racecheck"),
            "per_example": lambda: self.script("per_example", 60),
            "noise": lambda: self.script("noise", 60),
        }


def _loaded(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded


def _environment(device: int) -> dict[str, Any]:
    import torch

    query = ["nvidia-smi", f"--id={device}", "--format=csv,noheader", "--query-gpu=name,driver_version,clocks.sm"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError:
        smi = ""
    return {
        "device": torch.cuda.get_device_name(device),
        "nvidia_smi": smi or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def main() -> int:
    """Run the stages and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for logs and figures")
    parser.add_argument("--only", help="stages to run, comma-separated; build is always run")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        parser.exit(2, "gpu_check: torch is not installed for this python. Install it first.\n")
    if not torch.cuda.is_available() or arguments.device >= torch.cuda.device_count():
        parser.exit(2, f"gpu_check: torch sees no GPU {arguments.device}; this check needs one.\n")
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    environment = _environment(arguments.device)
    with tempfile.TemporaryDirectory(prefix="pybatch-gpu-check-") as site:
        stages = Check(arguments.device, output, Path(site)).stages()
        wanted = set(arguments.only.split(",")) | {"build"} if arguments.only else set(stages)
        if unknown := wanted - set(stages):
            parser.exit(2, f"gpu_check: no stage {', '.join(sorted(unknown))}. There are: {', '.join(stages)}.\n")
        for name, stage in stages.items():
            if name not in wanted:
                continue
            outcomes.append(stage())
            last = outcomes[-1]
            print(f"{last.stage:22} {last.status:8} {last.seconds:6.1f} s", flush=True)
            # Written after every stage: what was measured stays if the machine does not.
            summary = {"environment": environment, "stages": [asdict(outcome) for outcome in outcomes]}
            (output / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
            if name == "build" and last.status != "ok":
                break
    for outcome in outcomes:
        if outcome.status in ("failed", "timeout"):
            print(f"\n--- {outcome.stage} ({outcome.status}), end of its log ---\n{outcome.detail}")
    return int(any(outcome.status in ("failed", "timeout") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
