"""`pybatch doctor`, what is compiled and what this machine lets pybatch read, and `pybatch list`, what ships."""

from __future__ import annotations

import inspect

import torch
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_info

from pybatch import ops, optim, scaling
from pybatch.base import numerals
from pybatch.commands.printing import ResultConsole
from pybatch.device.counters import Region, readable
from pybatch.device.environment import capture
from pybatch.device.identity import describe, missing, resolve
from pybatch.training.schedules import SCHEDULES
from pybatch.workloads.running.finding import shipped

Findings = list[tuple[str, list[tuple[str, str]]]]


def doctor() -> None:
    """What is compiled, which devices are there, which counters can be read, and why one can't."""
    _print(examine())


def list_() -> None:
    """The workloads and optimizers that ship."""
    _print(catalogue())


def _print(findings: Findings) -> None:
    console = ResultConsole()
    width = max(len(name) for _, rows in findings for name, _ in rows)
    for heading, rows in findings:
        console.print(Text(heading, style="bold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=width, no_wrap=True)
        for name, text in rows:
            grid.add_row(Text(name), Text(text))
        console.print(Padding(grid, (0, 0, 0, 2)))


def examine() -> Findings:
    """Headed lists of (what, finding); a finding that is missing says why."""
    device = resolve(None)
    return [
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Compiled core", _core()),
        ("Backends of the optimizers", _backends(device)),
        (f"Counters on {device}", _counters(device)),
    ]


def _versions() -> list[tuple[str, str]]:
    found = capture(seed=0)
    versions = {"pybatch": found.pybatch, "python": found.python, "torch": found.torch, **found.libraries}
    versions |= {"driver": found.driver, "cuda": found.cuda}
    return [(name, version or "not there") for name, version in versions.items()]


def _devices() -> list[tuple[str, str]]:
    places = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows = []
    for place in places:
        device = describe(place)
        parts = [device.name, f"{device.cores} cores" if device.cores else "", numerals.memory(device.memory_bytes)]
        rows.append((str(place), ", ".join(part for part in parts if part)))
    if len(places) == 1 and (reason := missing(0)) is not None:
        rows.append(("cuda:0", f"none: {reason}"))
    return rows


def _core() -> list[tuple[str, str]]:
    build = ops.build()
    cuda = f"for {build.cuda_architectures}" if build.cuda else f"none: {build.cuda_reason}"
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp"]
    files = ", ".join(f"{pool['num_threads']} threads" for pool in pools) or "none loaded"
    warning = "; two pools spin against each other, see torch's libgomp" if len(pools) > 1 else ""
    return [
        ("vector width", build.cpu_width),
        ("CUDA part", cuda),
        ("OpenMP pools", f"{len(pools)} ({files}){warning}"),
    ]


def _backends(device: torch.device) -> list[tuple[str, str]]:
    return [(name, ops.why_not(name, device) or f"works on {device}") for name in ops.BACKENDS]


def _counters(device: torch.device) -> list[tuple[str, str]]:
    """Each figure, and which source of a GPU's utilization is used, and why none of the better ones."""
    region = Region(device)
    origins = region.origins
    found: dict[str, list[str]] = {}
    for name, why in readable(region).items():
        found.setdefault(why or origins.get(name, "readable"), []).append(name)
    rows = [_row(names, text) for text, names in found.items()]
    if device.type == "cpu":
        return rows
    return [("utilization by", region.source.name if region.source is not None else "nothing"), *rows]


def _row(names: list[str], text: str) -> tuple[str, str]:
    """What is to be said of one figure, or of several alike."""
    return (names[0], text) if len(names) == 1 else (f"{len(names)} figures", f"{', '.join(names)}: {text}")


def catalogue() -> Findings:
    """Headed lists of (name, description) of what ships."""
    workloads = []
    for name, kind in sorted(shipped().items()):
        models = f" Models: {', '.join(kind.models)}." if kind.models else ""
        sizes = f" Sizes: {', '.join(kind.sizes)}." if kind.sizes else ""
        aims = ", ".join(f"{split} {loss:g}" for split, loss in kind.target.items())
        aim = f" Swept by {kind.swept_by} to {aims}." if aims else ""
        workloads.append((name, _summary(kind) + models + sizes + aim))
        workloads += [(f"  {dial}=", what) for dial, what in kind.dials.items()]
    workloads.append(("FILE.py:CLASS", "A pybatch.Workload of your own."))
    names = sorted((name for name in optim.__all__ if name != "FusedOptimizer"), key=str.casefold)
    optimizers = [(name, _summary(getattr(optim, name))) for name in names]
    rules = [(name, _summary(rule)) for name, rule in scaling.rules().items()]
    return [
        ("Workloads (--workload NAME --model MODEL --size SIZE --option DIAL=VALUE)", workloads),
        ("Optimizers (pybatch.optim.NAME)", optimizers),
        ("Learning-rate rules (pybatch sweep --rule NAME)", rules),
        ("Schedules (pybatch sweep --schedule NAME)", list(SCHEDULES.items())),
    ]


def _summary(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
