"""A workload as another process can load it."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pybatch.base.errors import WorkloadError
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import FILE_MODULE, load_file
from pybatch.workloads.running.sharing import put_back


@dataclass(frozen=True)
class Packed:
    """A pickled workload, the files its modules were made from, and where this process looks for modules.

    It is made by this process for its own children, and never read from a file.
    """

    workload: bytes
    files: dict[str, str]
    path: tuple[str, ...]

    def open(self) -> Workload:
        """The workload, in the other process."""
        sys.path[:] = list(dict.fromkeys([*sys.path, *self.path]))
        for name, file in self.files.items():
            load_file(Path(file), name)
        with put_back(next(iter(self.files.values()), "")):
            workload: Workload = pickle.loads(self.workload)
        return workload


def pack(workload: Workload) -> Packed:
    """Pack a workload; by cloudpickle where its class cannot be imported. Raises WorkloadError where neither can."""
    module = sys.modules.get(type(workload).__module__)
    try:
        if module is None or module.__name__ == "__main__":
            raise pickle.PicklingError("its class is in __main__")  # another process has another __main__
        packed = pickle.dumps(workload)
    except Exception as error:  # pickling runs the user's code and raises what that raises
        packed = _by_value(workload, error)
    return Packed(packed, _files(packed), _path())


def _files(packed: bytes) -> dict[str, str]:
    """The files of the modules that it names; others that this process has loaded are not its business."""
    loaded = ((name, module) for name, module in sys.modules.items() if name.startswith(FILE_MODULE))
    return {name: str(module.__file__) for name, module in loaded if name.encode() in packed}


def _path() -> tuple[str, ...]:
    return tuple(entry for entry in sys.path if entry)  # "" would be whatever folder the other process is in


def _by_value(workload: Workload, cause: Exception) -> bytes:
    what = f"workload {workload.name!r} cannot be sent to another process"
    try:
        import cloudpickle  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise WorkloadError(f"{what} ({cause}). Install cloudpickle, or move its class to a file.") from None
    try:
        data: Any = cloudpickle.dumps(workload)
    except Exception as error:
        raise WorkloadError(f"{what} ({error}).") from error
    return bytes(data)
