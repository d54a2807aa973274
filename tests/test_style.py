"""The checks of ruff, mypy and clang-format, as tests: what they find fails the suite."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases.paths import ROOT

CXX = sorted(
    str(p) for d in ("csrc", "kernels") for p in (ROOT / d).iterdir() if p.suffix in {".h", ".cpp", ".cu", ".cuh"}
)


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("clang-format", "--dry-run", "--Werror", *CXX),
    ],
    ids=["ruff-check", "ruff-format", "mypy", "clang-format"],
)
def test_clean(command):
    tool = Path(sys.executable).parent / command[0]  # of this environment, not another one on PATH
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_has_no_gap_left_to_fill():
    assert "@@" not in (ROOT / "README.md").read_text()
