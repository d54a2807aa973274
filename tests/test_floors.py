"""Imports run strictly downward, and what reads records needs no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from cases.paths import ROOT

# Rooms that stand side by side know nothing of each other; each may import from the floors below, and from itself.
FLOORS = (
    ("base",),
    ("records", "scaling"),
    ("fits",),
    ("answer",),
    ("ops", "device", "report"),
    ("optim",),
    ("workloads",),
    ("noise", "schedule", "training"),
    ("processes",),
    ("capacity", "sweep", "branch"),
    ("watch",),
    ("jobs",),
    ("integrations",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = (
    "base.progress",
    "records",
    "scaling",
    "fits.throughput",
    "fits.steps",
    "fits.accumulator",
    "answer.verdict",
    "answer.merge",
    "noise.trajectory",
    "sweep.archive",
    "report.formats.text",
    "report.formats.html",
    "cli",
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module):
    return module.split(".")[1]


def imported(module, source):
    """The modules of pybatch that this source imports; lazy imports inside functions count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if is_module(name) else node.module for name in inner)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("pybatch.") and room_of(name) not in ("_C", "kernels")}


def upward(module, source):
    """Imports in this source that break the rule."""
    own = room_of(module)
    assert own in FLOOR, f"{module} stands on no floor: add it to FLOORS"
    return sorted(n for n in imported(module, source) if room_of(n) != own and FLOOR[room_of(n)] >= FLOOR[own])


SOURCES = {
    module_of(path): path.read_text()
    for path in sorted((ROOT / "pybatch").rglob("*.py"))
    if path != ROOT / "pybatch" / "__init__.py"
}


def test_imports_run_downward():
    assert {module: up for module, source in SOURCES.items() if (up := upward(module, source))} == {}


def test_no_room_has_a_circle():
    """Within a room too, what imports a module is not imported by it."""
    TopologicalSorter({module: imported(module, source) - {module} for module, source in SOURCES.items()}).prepare()


def test_every_room_stands_on_one_floor():
    assert set(FLOOR) == {room_of(module) for module in SOURCES}
    assert len(FLOOR) == sum(map(len, FLOORS))


def test_an_upward_import_is_caught():
    assert upward("pybatch.answer.x", "from pybatch.report import output") == ["pybatch.report.output"]
    assert upward("pybatch.capacity.x", "def f():\n    from pybatch import cli") == ["pybatch.cli"]
    assert upward("pybatch.capacity.x", "from pybatch.sweep.measurement import y") == ["pybatch.sweep.measurement"]
    assert upward("pybatch.capacity.x", "from pybatch.capacity.y import z") == []


def test_only_ops_imports_the_compiled_core():
    """One room knows `_C` and the kernels; of pybatch the kernels know the numbers in `ops.compiled` alone."""
    for module, source in SOURCES.items():
        if room_of(module) != "ops":
            assert "pybatch._C" not in source, module
            assert "import _C" not in source, module
            assert "pybatch.kernels" not in source, module


def test_reads_records_without_torch():
    """In one process, since torch that was loaded by any of them is found at the end."""
    code = "import sys, importlib; sys.modules['torch'] = None\n"
    code += "".join(f"importlib.import_module('pybatch.{module}')\n" for module in TORCH_FREE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_catalogue_is_true():
    """Every public name can be loaded, and is listed for type checkers too."""
    import pybatch

    source = (ROOT / "pybatch" / "__init__.py").read_text()
    for name in pybatch.__all__:
        assert getattr(pybatch, name) is not None
        assert f"import {name} as {name}" in source
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pybatch.nothing
