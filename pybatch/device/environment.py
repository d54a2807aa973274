"""Where and how a run took place: versions, commit, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

import torch

from pybatch.device import settings
from pybatch.device.nvml import driver_version
from pybatch.records import Environment

_LIBRARIES = ("numpy", "scipy", "scikit-learn", "triton", "psutil", "nvidia-ml-py")

# That change speed or numbers.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def capture(seed: int, command: str | None = None) -> Environment:
    """The environment of this process; `command` defaults to how it was started."""
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        pybatch=_version("pybatch") or "not installed",
        torch=torch.__version__,
        commit=_commit(),
        driver=driver_version(),
        cuda=torch.version.cuda,
        threads=torch.get_num_threads(),
        seed=seed,
        command=" ".join(sys.argv) if command is None else command,
        libraries={name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ} | settings.changed(),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the git checkout at the working directory, "-dirty" appended where tracked files changed."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a repository too slow to ask
        return None
    return done.stdout.strip() if done.returncode == 0 else None
