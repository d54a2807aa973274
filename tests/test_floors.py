"""Imports run strictly downward, and what reads records needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The longest prefix counts. A module may import from lower floors, and from its own package on its own floor.
FLOORS = {
    "pybatch.errors": 0,
    "pybatch.numerals": 0,
    "pybatch.display": 0,
    "pybatch.ranges": 0.5,  # these two raise the errors
    "pybatch.codec": 0.5,
    "pybatch.scaling": 0.5,
    "pybatch.records": 0.6,
    "pybatch.fits": 0.65,  # makes records
    "pybatch.kernels": 0,
    "pybatch._C": 0,
    "pybatch.tradeoff": 0.7,
    "pybatch.advice": 0.8,
    "pybatch.claims": 0.8,
    "pybatch.factors": 0.8,
    "pybatch.frontier": 0.8,
    "pybatch.critical": 0.8,
    "pybatch.best": 0.8,
    "pybatch.verdict": 1,
    "pybatch.comparison": 1.5,
    "pybatch.joining": 1.5,
    "pybatch.noise.estimator": 1,
    "pybatch.noise.accumulator": 1,
    "pybatch.noise.trajectory": 1,
    "pybatch.device": 1,
    "pybatch.ops": 1,
    "pybatch.optim": 2,
    "pybatch.workloads": 2,
    "pybatch.report": 2,
    "pybatch.noise": 3,
    "pybatch.capacity": 3,
    "pybatch.convergence": 3,
    "pybatch.continuation": 3,
    "pybatch.bench": 4,
    "pybatch.together": 4.2,
    "pybatch.doctor": 4,
    "pybatch.sweep": 4,
    "pybatch.commands": 4.5,
    "pybatch.cli": 5,
    "pybatch.__main__": 6,
}
TORCH_FREE = (
    "errors",
    "numerals",
    "ranges",
    "records",
    "fits.throughput",
    "fits.steps",
    "verdict",
    "noise.estimator",
    "noise.accumulator",
    "noise.trajectory",
    "convergence.archive",
    "report.formats",
    "cli",
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def floor_of(module):
    prefixes = [p for p in FLOORS if module == p or module.startswith(p + ".")]
    assert prefixes, f"{module} stands on no floor: add it to FLOORS"
    return FLOORS[max(prefixes, key=len)]


def package_of(module):
    return ".".join(module.split(".")[:2])


def upward_imports(module, source):
    """Imports in this source that break the rule, as (module, imported) pairs; lazy ones inside functions count."""
    broken = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("pybatch."):
                continue
            own_package = package_of(name) == package_of(module) and floor_of(name) == floor_of(module)
            if not own_package and floor_of(name) >= floor_of(module):
                broken.append((module, name))
    return broken


SOURCES = sorted(p for p in (ROOT / "pybatch").rglob("*.py") if p != ROOT / "pybatch" / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_run_downward(path):
    assert upward_imports(module_of(path), path.read_text()) == []


def test_an_upward_import_is_caught():
    assert upward_imports("pybatch.verdict", "from pybatch.report import formats") == [
        ("pybatch.verdict", "pybatch.report.formats")
    ]
    assert upward_imports("pybatch.capacity.x", "def f():\n    from pybatch import cli") == [
        ("pybatch.capacity.x", "pybatch.cli")
    ]
    assert upward_imports("pybatch.capacity.x", "from pybatch.noise.micro_batch import y") != []
    assert upward_imports("pybatch.capacity.x", "from pybatch.capacity.y import z") == []


def test_only_ops_imports_the_compiled_core():
    """One package knows `_C` and the kernels; the kernels themselves know nothing of pybatch."""
    for path in SOURCES:
        if package_of(module_of(path)) != "pybatch.ops":
            source = path.read_text()
            assert "pybatch._C" not in source, path
            assert "import _C" not in source, path
            assert "pybatch.kernels" not in source, path


@pytest.mark.parametrize("module", TORCH_FREE)
def test_reads_records_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import pybatch.{module}"
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
