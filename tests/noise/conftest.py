"""Processes that measure noise together, made once for all files that ask."""

import json
import os
import subprocess

import pytest
from cases.paths import TESTS

WORKER = TESTS / "cases" / "noise_worker.py"


WORLDS = (2, 4)


@pytest.fixture(scope="session")
def processes(tmp_path_factory, warm_python):
    """What each of so many processes found, by how many they are."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [warm_python, str(WORKER), *map(str, WORLDS), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return {
        world: [json.loads((folder / f"{world}/{rank}.json").read_text()) for rank in range(world)] for world in WORLDS
    }


@pytest.fixture
def wide(monkeypatch):
    """Measuring stops at an interval twice as wide, for a quarter of the groups: where it is wide enough to tell."""
    from pybatch.noise import measurement

    monkeypatch.setattr(measurement, "WIDTH", 2 * measurement.WIDTH)


@pytest.fixture(params=WORLDS)
def ranks(request, processes):
    return processes[request.param]
