"""The counters against Nsight Compute: what does each source read for work whose utilization `ncu` counts by replay?

    python bench/counters.py --device cuda [--output FILE]

Two pieces of work keep the device busy with one kernel after the other: a large bf16 matrix product, and a copy. Each
source that works here (NVML GPM, CUPTI PM sampling, Kineto's estimate) reads two seconds of it; `ncu` then counts some
of the same kernels in a process of its own. `ncu` sees single kernels and the sources a stretch of them with the gaps
between, so that a share of 0.97 against 0.99 is agreement. On a CPU there is nothing to compare: exit status 2.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pybatch.device.counters_cupti import PmSampling
from pybatch.device.counters_kineto import Kineto
from pybatch.device.counters_nvml import Gpm
from pybatch.device.identity import describe

WORKS = ("gemm", "copy")
SECONDS = 2.0  # of each reading
SKIP, COUNT = 5, 3  # kernels that ncu passes over, and those it counts
SUFFIX = ".avg.pct_of_peak_sustained_elapsed"
NCU = {  # our figure: ncu's metric
    "sm_active": "sm__cycles_active",
    "sm_occupancy": "sm__warps_active",
    "tensor_active": "sm__pipe_tensor_cycles_active",
    "dram_active": "dram__throughput",
}


def work_of(name: str, device: torch.device) -> Callable[[], object]:
    """The work: one kernel a call."""
    if name == "copy":
        source = torch.randn(1 << 28, device=device)  # 1 GiB: many times any cache
        target = torch.empty_like(source)
        return lambda: torch.neg(source, out=target)  # copy_() of equal layouts is no kernel, which ncu would not see
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def read(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What every source says of the work, or why it says nothing."""
    for _ in range(3):
        work()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        work()
    torch.cuda.synchronize(device)
    step_s = (time.perf_counter() - start) / 10
    found: dict[str, Any] = {"step_ms": 1e3 * step_s}
    for kind in (Gpm, PmSampling):
        source = kind(device)
        source.start()
        start = time.perf_counter()
        for _ in range(max(1, round(SECONDS / step_s))):
            work()
        torch.cuda.synchronize(device)
        found[kind.name] = {"read": source.stop(time.perf_counter() - start), "reasons": source.reasons}
        del source
    estimate = Kineto(device)
    found[Kineto.name] = {"read": estimate.estimate(work, step_s), "reasons": estimate.reasons}
    return found


def count(name: str, limit_s: float) -> dict[str, Any]:
    """What ncu counts in kernels of the same work: means over them, as shares."""
    program = ncu()
    if program is None:
        return {"reasons": "ncu is not on PATH"}
    reason = ""
    for figures in (list(NCU), [figure for figure in NCU if figure != "tensor_active"]):  # its name is not every chip's
        metrics = ",".join(NCU[figure] + SUFFIX for figure in figures)
        command = [program, "--csv", "--page", "raw", "--clock-control", "none", "--metrics", metrics]
        command += ["--launch-skip", str(SKIP), "--launch-count", str(COUNT), sys.executable, __file__, "--work", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return {"reasons": reason or f"ncu took more than {limit_s:g} s"}
        rows = parse(done.stdout)
        if rows:
            return {"read": {figure: sum(row[figure] for row in rows) / len(rows) / 100 for figure in rows[0]}}
        reason = reason or f"ncu ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
    return {"reasons": reason}


def parse(text: str) -> list[dict[str, float]]:
    """The metrics of each kernel in ncu's raw CSV: lines of "==PROF==", a line of names, one of units, then kernels."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = []
    for row in csv.DictReader(lines):
        figures = {}
        for figure, metric in NCU.items():
            try:
                figures[figure] = float((row.get(metric + SUFFIX) or "").replace(",", ""))
            except ValueError:  # the line of units, or a metric this chip lacks
                continue
        if figures:
            rows.append(figures)
    common = set.intersection(*map(set, rows)) if rows else set()
    return [{figure: row[figure] for figure in NCU if figure in common} for row in rows]


def ncu() -> str | None:
    """Nsight Compute's command."""
    places = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    known = ["ncu", "/usr/local/cuda/bin/ncu", *map(str, reversed(places))]
    return next((path for name in known if (path := shutil.which(name)) is not None), None)


def main() -> int:
    """Read, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)  # what ncu looks at
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        parser.exit(2, "counters: a GPU's counters are compared here, and there is none.\n")
    if arguments.work is not None:
        work = work_of(arguments.work, device)
        for _ in range(SKIP + COUNT + 2):
            work()
        torch.cuda.synchronize(device)
        return 0
    figures: dict[str, Any] = {"device": describe(torch.device("cuda", 0)).name, "works": {}}
    for name in WORKS:
        found = read(work_of(name, device), device)
        torch.cuda.empty_cache()
        found["ncu"] = count(name, 60.0)
        figures["works"][name] = found
        for source in (Gpm.name, PmSampling.name, Kineto.name, "ncu"):
            text = {k: round(v, 3) for k, v in found[source].get("read", {}).items()} or found[source]["reasons"]
            print(f"{name:5} {source:18} {text}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
