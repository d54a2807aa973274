"""A worker process: units of trials on stdin, outcomes on stdout, both pickled by pybatch's own processes.

Started by `convergence.jobs` as `python -m pybatch.processes.child`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import Any

import torch

from pybatch.device.memory import keep_freed
from pybatch.processes.workers import Setup, train


def main() -> None:
    """Read the setup, then run units until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the workload's own prints must not reach the answers
    parent = os.getppid()

    def answer(value: Any) -> None:
        answers.write(pickle.dumps(value))
        answers.flush()

    def look(text: str, share: float) -> None:
        if os.getppid() != parent:  # killed: nobody waits for what is trained here
            os._exit(1)

    try:
        setup: Setup = _asked()
        torch.set_num_threads(setup.threads)
        keep_freed()
        workload = setup.workload.open()
        while True:
            unit = _asked()
            answer(train(workload, unit, answer, torch.device(setup.device), look))
    except (_DriverEndedError, BrokenPipeError):
        return


class _DriverEndedError(Exception):
    """Nothing more will be asked."""


def _asked() -> Any:
    """The next message; raises where the driver ended, perhaps within one."""
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        raise _DriverEndedError from None


if __name__ == "__main__":
    main()
