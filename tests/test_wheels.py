"""What the hosted CI builds wheels from: that cibuildwheel takes it, and that its parts fit each other."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from cases.paths import ROOT

CUDA = ".github/cibuildwheel-cuda.toml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def settings(name):
    return tomllib.loads((ROOT / name).read_text())


@pytest.mark.parametrize("config", ["pyproject.toml", CUDA])
def test_cibuildwheel_takes_the_configuration(config):
    """One wheel for each Python that is supported; a name it does not know would give none."""
    least = settings("pyproject.toml")["project"]["requires-python"]
    command = ["-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64", "--config-file", config]
    done = subprocess.run(
        [sys.executable, *command, "--print-build-identifiers"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = done.stdout.split()
    assert built == settings(config)["tool"]["cibuildwheel"]["build"]
    assert built[0] == f"cp{least.removeprefix('>=').replace('.', '')}-manylinux_x86_64"


def test_both_kinds_are_built_alike():
    cpu, cuda = (settings(name)["tool"]["cibuildwheel"] for name in ("pyproject.toml", CUDA))
    for key in ("build", "build-frontend", "manylinux-x86_64-image"):
        assert cpu[key] == cuda[key]
    assert cpu["linux"]["repair-wheel-command"] == cuda["linux"]["repair-wheel-command"]
    assert (cpu["linux"]["environment"]["PYBATCH_CUDA"], cuda["linux"]["environment"]["PYBATCH_CUDA"]) == ("off", "on")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflow_names_files_that_are_there(path):
    text = path.read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert all("runs-on" in job and job["steps"] for job in jobs.values())
    for name in re.findall(r"(?:config: |bash )([\w./-]+)", text):
        assert (ROOT / name).is_file(), name
