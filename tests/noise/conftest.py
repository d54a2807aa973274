"""Processes that measure noise together, started once for all files that ask."""

import json
import os
import subprocess
import sys

import pytest
from cases.paths import TESTS

WORKER = TESTS / "cases" / "noise_worker.py"


def run(world, folder):
    """Start the processes, wait, and return what each wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(WORKER)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """What so many processes found."""
    found = {}

    def of(world):
        if world not in found:
            found[world] = run(world, tmp_path_factory.mktemp("ranks"))
        return found[world]

    return of


@pytest.fixture(params=[2, 3])
def ranks(request, processes):
    return processes(request.param)
