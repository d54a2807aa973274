"""What a workload is, by content: two workloads of one fingerprint train the same model on the same data."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session

DRAWN = 512  # examples of each split that enter: other data, or other dials of it, show in them


def fingerprint(workload: Workload) -> str:
    """JSON of the class, the model's name, its options, and hashes of drawn data, an initial model, a user's source.

    Options are all plain values the workload holds: one that is in the loss alone, or a dropout, shows nowhere else.
    """
    cls = type(workload)
    session = Session(workload, torch.device("cpu"))
    parts: dict[str, Any] = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "name": workload.name,
        "model": workload.model_name,
        "options": _options(workload),
        "data": _hash(session.batch(DRAWN, "train"), session.batch(DRAWN, "test")),
        "init": _hash(list(session.model.state_dict().values())),
        "source": workload.source() or _source(cls),
    }
    if workload.evaluation_examples != Workload.evaluation_examples:
        parts["evaluation_examples"] = workload.evaluation_examples
    return json.dumps(parts, sort_keys=True)


def _options(workload: Workload) -> dict[str, Any]:
    """Public attributes with plain values; a path may change while the data stay."""
    own = {key: value for key, value in vars(workload).items() if not key.startswith("_") and key != "data"}
    return {key: value for key, value in own.items() if _plain(value)} | dict(workload.options)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _hash(*values: Any) -> str:
    found = hashlib.sha256()
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()[:16]


def _source(cls: type) -> str | None:
    """Hash of the file a user's class is in; pybatch's own are told apart by the schema of the store."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__.startswith("pybatch.") or file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
